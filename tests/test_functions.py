"""Functions of a parameter tree: as they are, and by replay where they state widths."""

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from zoo import random_plan

import jaxprune as jp
from jaxprune import slicing, trees
from jaxprune.errors import EmissionError, GraphError
from jaxprune.frameworks import replay as rewriting
from jaxprune.frameworks.replay import replay
from jaxprune.verify import masked_outputs


def _params(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s) / np.sqrt(max(s[:-1] or (1,)))),
        shapes,
        is_leaf=lambda s: isinstance(s, tuple) and all(isinstance(n, int) for n in s),
    )


# Parameter trees as other libraries build them, all of the same network -----------


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Layer:
    """As an Equinox module: fields of arrays, called as a method."""

    weight: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return x @ self.weight.T + self.bias


class _Pair(NamedTuple):
    first: _Layer
    second: _Layer


def _haiku(params, x):
    hidden = params["mlp/~/linear_0"]
    x = jax.nn.relu(x @ hidden["w"] + hidden["b"])
    return x @ params["mlp/~/linear_1"]["w"] + params["mlp/~/linear_1"]["b"]


def _keras(variables, x):
    trained, other = variables
    kernel, bias, last = trained
    x = (x @ kernel + bias - other[0]) * jax.lax.rsqrt(other[1] + 1e-3)
    return jax.nn.relu(x) @ last


TREES = {
    "equinox": (
        lambda pair, x: pair.second(jnp.tanh(pair.first(x))),
        lambda: _Pair(
            _Layer(*_params([(9, 5), (9,)])), _Layer(*_params([(3, 9), (3,)]))
        ),
        {("first/weight", 0), ("first/bias", 0), ("second/weight", 1)},
    ),
    "haiku": (
        _haiku,
        lambda: _params(
            {
                "mlp/~/linear_0": {"w": (5, 9), "b": (9,)},
                "mlp/~/linear_1": {"w": (9, 3), "b": (3,)},
            }
        ),
        {("mlp/~/linear_0/w", 1), ("mlp/~/linear_0/b", 0), ("mlp/~/linear_1/w", 0)},
    ),
    "keras": (
        _keras,
        lambda: (
            _params([(5, 9), (9,), (9, 3)]),
            [jnp.ones((9,)), jnp.full((9,), 2.0)],
        ),
        {("0/0", 1), ("0/1", 0), ("0/2", 0), ("1/0", 0), ("1/1", 0)},
    ),
    "layers": (
        lambda layers, x: jnp.tanh(x @ layers[0][0] + layers[0][1]) @ layers[1][0],
        lambda: [tuple(_params([(5, 9), (9,)])), (_params([(9, 3)])[0],)],
        {("0/0", 1), ("0/1", 0), ("1/0", 0)},
    ),
}


@pytest.mark.parametrize("kind", list(TREES))
def test_any_tree_of_arrays_is_a_model(kind):
    call, make, places = TREES[kind]
    params, x = make(), jax.random.normal(jax.random.key(0), (4, 5))
    graph = jp.trace(call, params, x)
    (group,) = graph.groups
    assert {(slot.path, slot.axis) for slot in group.slots} == places
    plan = {group.name: [0, 4, 5]}
    slim = jp.shrink(graph, plan)
    assert slim.model is call
    assert jax.tree.structure(slim.variables) == jax.tree.structure(params)
    masked = slicing.mask_variables(graph, plan, params)
    np.testing.assert_allclose(call(slim.variables, x), call(masked, x), atol=1e-5)
    assert jp.verify(graph, plan, x) < 1e-5
    assert jp.verify(graph, plan, x, replay=True) < 1e-5
    momentum = optax.sgd(0.1, momentum=0.9).init(params)
    small = jp.shrink_like(graph, plan, momentum)
    shapes = jax.tree.map(jnp.shape, small[0].trace)
    assert shapes == jax.tree.map(jnp.shape, slim.variables)


# Programs that state widths ---------------------------------------------------------


def _heads(p, x):
    """Sizes in reshapes, a causal mask, a scale, a norm."""
    b, t, _ = x.shape
    q, k, v = jnp.split((x @ p["qkv"]).reshape(b, t, 3, 4, 6), 3, axis=2)
    q, k, v = (a.reshape(b, t, 4, 6).transpose(0, 2, 1, 3) for a in (q, k, v))
    weights = q @ k.transpose(0, 1, 3, 2) / np.sqrt(6)
    weights = jnp.where(jnp.tril(jnp.ones((t, t), bool)), weights, -1e9)
    y = (jax.nn.softmax(weights) @ v).transpose(0, 2, 1, 3).reshape(b, t, 24)
    y = y @ p["out"]
    y = (y - y.mean(-1, keepdims=True)) / jnp.sqrt(y.var(-1, keepdims=True) + 1e-5)
    return (y * p["scale"]) @ p["head"]


def _convolutions(p, x):
    """Feature groups, tiles, slices, channel pads and broadcasts by number."""

    def conv(x, w, groups=1):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip

    x = jax.nn.relu(conv(x, p["first"]) + jnp.broadcast_to(p["shift"], (8,)))
    x = jax.nn.relu(conv(x, p["depthwise"], 8))
    x = conv(x, p["grouped"], 4)
    a, b = x[..., :6], x[..., 6:12]
    x = a * jax.nn.sigmoid(b) + jnp.zeros((6,))
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 0), (1, 0)))
    mean = jnp.sum(x, (1, 2)) / (x.shape[1] * x.shape[2])
    return mean @ p["head"]


def _recurrent(p, x):
    """A scan, a remat, a branch and a loop around stated widths."""

    @jax.checkpoint
    def cell(h, x):
        h = jnp.tanh(x @ p["in"] + (h @ p["rec"]).reshape(-1, 7) + p["bias"])
        return h, h * jnp.ones((7,))

    h, hs = jax.lax.scan(cell, jnp.zeros((x.shape[0], 7)), x.swapaxes(0, 1))
    h = jax.lax.cond(x.sum() > 0, lambda h: h + p["bias"], lambda h: 2 * h, h)
    h = jax.lax.fori_loop(0, 3, lambda k, h: jnp.tanh(h @ p["loop"]), h)
    return (h + hs.sum(0).reshape(-1, 7)) @ p["out"]


def _words(p, x):
    """Gathers, a dynamic slice, an iota compared with a bound, a tied table."""
    h = jnp.take(p["table"], x, axis=0).reshape(*x.shape, 8)
    h = h + jax.lax.dynamic_slice(p["places"], (0, 0), (x.shape[1], 8))
    h = jax.nn.gelu((h @ p["up"]).reshape(-1, 12)) @ p["down"]
    return h.reshape(*x.shape, 8) @ p["table"].T


PROGRAMS = {
    "heads": (
        _heads,
        {"qkv": (10, 72), "out": (24, 14), "scale": (14,), "head": (14, 3)},
        lambda b: jax.random.normal(jax.random.key(1), (b, 5, 10)),
    ),
    "convolutions": (
        _convolutions,
        {
            "first": (3, 3, 3, 8),
            "shift": (8,),
            "depthwise": (3, 3, 1, 8),
            "grouped": (1, 1, 2, 12),
            "head": (7, 3),
        },
        lambda b: jax.random.normal(jax.random.key(1), (b, 6, 6, 3)),
    ),
    "recurrent": (
        _recurrent,
        {"in": (5, 7), "rec": (7, 7), "bias": (7,), "loop": (7, 7), "out": (7, 2)},
        lambda b: jax.random.normal(jax.random.key(1), (b, 4, 5)),
    ),
    "words": (
        _words,
        {"table": (11, 8), "places": (9, 8), "up": (8, 12), "down": (12, 8)},
        lambda b: jax.random.randint(jax.random.key(1), (b, 4), 0, 11),
    ),
}


@pytest.mark.parametrize("name", list(PROGRAMS))
def test_replay_prunes_what_the_source_states(name):
    call, shapes, make = PROGRAMS[name]
    params, x = _params(shapes), make(2)
    graph = jp.trace(call, params, x)
    plan = random_plan(graph, 3)
    assert jp.shrink(graph, plan).report["left_whole"]
    slim = jp.shrink(graph, plan, replay=True)
    assert slim.report["left_whole"] == {}
    assert {n: len(k) for n, k in slim.plan.items()} == {
        n: len(k) for n, k in plan.items()
    }
    assert jp.verify(graph, plan, x, replay=True) < 1e-5
    # Another batch size, under jit, and the gradients of the masked network.
    x = make(5)
    assert jp.verify(graph, plan, x, replay=True) < 1e-5

    def loss(run):
        return lambda params: sum((y**2).sum() for y in jax.tree.leaves(run(params)))

    oracle = loss(lambda p: masked_outputs(graph, plan, p, (x,), replay=True))
    wanted = trees.flatten(jax.grad(oracle)(params))
    found = jax.jit(jax.grad(loss(lambda p: slim.model(p, x))))(slim.variables)
    kept = slicing.keep_indices(graph, plan)
    for path, gradient in trees.flatten(found).items():
        expected = slicing.take(wanted[path], kept.get(path, {}))
        np.testing.assert_allclose(gradient, expected, rtol=1e-3, atol=1e-3)


class _Net(nn.Module):
    """A Linen module with a stated width, statistics and dropout."""

    remat: bool = False

    @nn.compact
    def __call__(self, x, train=False):
        conv = nn.remat(nn.Conv) if self.remat else nn.Conv
        x = conv(8, (3, 3), name="a")(x)
        x = nn.BatchNorm(use_running_average=not train, name="n")(x)
        x = nn.relu(x).reshape(x.shape[0], -1, 8).mean(1)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        x = nn.Dense(12, name="b")(x).reshape(-1, 12)
        return nn.Dense(3, name="c")(jnp.maximum(x, 0))


def _train(model):
    def call(variables, x, key):
        return model.apply(
            variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": key}
        )

    return call


def test_another_call_of_the_model_is_replayed_at_the_same_plan():
    model, x = _Net(), jax.random.normal(jax.random.key(0), (6, 5, 5, 3))
    variables = model.init(jax.random.key(1), x)
    graph = jp.trace(model, variables, x)
    plan = {"a": np.array([1, 2, 5]), "b": np.array([0, 3, 7, 11])}
    slim = jp.shrink(graph, plan, replay=True)
    train = replay(graph, plan, _train(model))
    key = jax.random.key(3)
    out, state = jax.jit(train)(slim.variables, x, key)
    assert out.shape == (6, 3)
    masked = slicing.mask_variables(graph, plan, variables)
    _, wanted = _train(model)(masked, x, key)
    for name in ("mean", "var"):
        np.testing.assert_allclose(
            state["batch_stats"]["n"][name],
            wanted["batch_stats"]["n"][name][plan["a"]],
            rtol=1e-5,
        )
    # Dropout is active: another key, another result.
    assert (
        float(jnp.abs(train(slim.variables, x, jax.random.key(4))[0] - out).max()) > 0
    )

    def loss(params):
        variables = {**slim.variables, "params": params}
        out, state = train(variables, x, key)
        return (out**2).mean(), state

    optimizer = optax.adam(1e-2)
    params = slim.variables["params"]
    state = optimizer.init(params)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    losses = []
    for _ in range(15):
        (value, _), grads = step(params)
        updates, state = optimizer.update(grads, state)
        params = optax.apply_updates(params, updates)
        losses.append(float(value))
    assert losses[-1] < 0.5 * losses[0]


def test_rematerialised_calls_stay_rematerialised():
    model, x = _Net(remat=True), jnp.ones((2, 5, 5, 3))
    graph = jp.trace(model, model.init(jax.random.key(1), x), x)
    slim = jp.shrink(graph, {"a": [0, 1]}, replay=True)
    jaxpr = jax.make_jaxpr(slim.model)(slim.variables, x)
    assert any("remat" in eqn.primitive.name for eqn in jaxpr.eqns)


def test_a_call_that_uses_the_arrays_otherwise_is_refused():
    model, x = _Net(), jnp.ones((2, 5, 5, 3))
    graph = jp.trace(model, model.init(jax.random.key(1), x), x)
    plan = {"a": [0, 1]}
    slim = jp.shrink(graph, plan, replay=True)
    other = replay(
        graph, plan, lambda v, x: x @ jnp.sort(v["params"]["a"]["kernel"][0, 0], -1)
    )
    with pytest.raises(EmissionError, match="params/a/kernel axis 3.*no rule knows"):
        other(slim.variables, x)
    other = replay(
        graph,
        plan,
        lambda v, x: v["params"]["a"]["bias"] + v["params"]["b"]["bias"][:8],
    )
    with pytest.raises(EmissionError, match="ties indices together that the plan"):
        other(slim.variables, x)


def test_a_size_that_is_not_rewritten_is_found(monkeypatch):
    call, shapes, make = PROGRAMS["convolutions"]
    graph = jp.trace(call, _params(shapes), make(2))
    plan = random_plan(graph, 3)
    assert jp.shrink(graph, plan, replay=True).report["left_whole"] == {}
    monkeypatch.delitem(rewriting._RULES, "slice")
    left = jp.shrink(graph, plan, replay=True).report["left_whole"]
    assert "grouped" in left and "cannot be replayed" in left["grouped"]


def test_functions_that_cannot_be_traced_say_why():
    with pytest.raises(GraphError, match="apply= is for Flax modules"):
        jp.trace(lambda p, x: x @ p, jnp.ones((3, 2)), jnp.ones((1, 3)), apply=print)
    with pytest.raises(GraphError, match="does not run on these variables"):
        jp.trace(lambda p, x: x @ p["w"], {"v": jnp.ones((3, 2))}, jnp.ones((1, 3)))
    with pytest.raises(GraphError, match="act.*is no array"):
        jp.trace(
            lambda p, x: p["act"](x @ p["w"]),
            {"w": jnp.ones((3, 2)), "act": jnp.tanh},
            jnp.ones((1, 3)),
        )


def test_noise_from_a_key_adopts_the_channels_it_meets():
    def noisy(params, x, key):
        keys = jax.random.split(key)
        h = x @ params["a"]
        h = h + 0.1 * jax.random.normal(keys[1], h.shape)
        return (
            jnp.where(jax.random.bernoulli(keys[0], 0.5, h.shape), h, 0) @ params["b"]
        )

    params = _params({"a": (5, 8), "b": (8, 3)})
    x = jax.random.normal(jax.random.key(1), (2, 5)), jax.random.key(0)
    graph = jp.trace(noisy, params, x)
    assert [g.size for g in graph.groups] == [8]
    # The slim model draws at its own width, and so does the masked original.
    assert jp.verify(graph, {"a": [1, 2, 6]}, x) < 1e-5
    assert jp.verify(graph, {"a": [1, 2, 6]}, x, replay=True) < 1e-5


KEY = jax.random.key(7)


@pytest.mark.parametrize("key", [lambda: jax.random.key(42), lambda: KEY])
def test_what_a_fixed_key_draws_is_a_table(key):
    """Random features: at another width the same key would draw other ones."""

    def features(params, x):
        h = x @ params["a"]
        table = jax.random.normal(key(), (h.shape[-1], 16))
        return jnp.cos(h @ table) @ params["b"]

    params = _params({"a": (5, 8), "b": (16, 3)})
    x = jax.random.normal(jax.random.key(1), (2, 5))
    assert jp.trace(features, params, x).groups == ()
    assert "a draw from a fixed key" in jp.trace(features, params, x).explain("a")
    graph = jp.trace(features, params, x, replay=True)
    kept = [1, 2, 6]
    slim = jp.shrink(graph, {"a": kept})
    silent = {**params, "a": params["a"].at[:, [0, 3, 4, 5, 7]].set(0.0)}
    np.testing.assert_allclose(
        jax.jit(slim.model)(slim.variables, x), features(silent, x), atol=1e-5
    )
    assert jp.verify(graph, {"a": kept}, x) < 1e-5

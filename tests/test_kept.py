"""Kept-index maps and the mirrors of the variables: optimiser states, EMAs."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from zoo import make, random_plan

import jaxprune as jp
from jaxprune import trees
from jaxprune.errors import GraphError, PlanError


def _pruned(name="vgg_small", seed=0):
    model, variables, x = make(name)
    graph = jp.trace(model, variables, x)
    return graph, variables, jp.shrink(graph, random_plan(graph, seed)), x


def _equal(a, b):
    a, b = trees.flatten(a), trees.flatten(b)
    assert a.keys() == b.keys()
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def test_kept_indices_slice_every_array_as_the_surgeon_does():
    graph, variables, slim, _ = _pruned()
    kept = jp.kept_indices(graph, slim.plan)
    assert set(kept["params/conv1/kernel"]) == {2, 3}
    np.testing.assert_array_equal(kept["params/bn0/scale"][0], slim.plan["conv0"])
    _equal(kept.take(variables), slim.variables)
    with pytest.raises(PlanError, match=r"bn0/mean: expected length 8 on axis 0"):
        kept.take(slim.variables)


def test_kept_indices_survive_json_and_become_masks():
    graph, variables, slim, _ = _pruned("resnet20")
    kept = jp.kept_indices(graph, slim.plan)
    again = jp.KeptIndices.from_json(json.loads(json.dumps(kept.to_json())))
    _equal(again.take(variables), slim.variables)
    masks = kept.masks()
    for path, leaf in trees.flatten(variables).items():
        assert all(leaf.shape[a] == m.size for a, m in masks.get(path, {}).items())
    assert jp.KeptIndices.from_masks(masks).to_json() == kept.to_json()


def test_rounds_compose_in_their_order_only():
    graph, variables, slim, x = _pruned(seed=0)
    second = jp.trace(slim.model, slim.variables, x)
    twice = jp.shrink(second, random_plan(second, 4))
    first, later = (
        jp.kept_indices(graph, slim.plan),
        jp.kept_indices(second, twice.plan),
    )
    _equal(first.then(later).take(variables), twice.variables)
    with pytest.raises(PlanError, match="in the order they were made"):
        later.then(first)


OPTIMISERS = {
    "adam": optax.adam(1e-2),
    "momentum": optax.sgd(1e-2, momentum=0.9),
    "clipped": optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "hyperparams": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "masked": optax.masked(
        optax.adam(1e-2),
        lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    ),
    "multi": optax.multi_transform(
        {"kernel": optax.adam(1e-2), "rest": optax.sgd(1e-2, momentum=0.9)},
        lambda params: jax.tree_util.tree_map_with_path(
            lambda path, _: "kernel" if path[-1].key == "kernel" else "rest", params
        ),
    ),
    "ema": optax.chain(optax.adam(1e-2), optax.ema(0.9)),
    "accumulated": optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2),
}


@pytest.mark.parametrize("name", list(OPTIMISERS))
def test_any_state_is_sliced_as_its_parameters(name):
    graph, variables, slim, _ = _pruned()
    optimiser, params = OPTIMISERS[name], variables["params"]
    # With the parameters as gradients, moments are functions of single entries.
    _, state = jax.jit(optimiser.update)(params, optimiser.init(params), params)
    small = jp.shrink_like(graph, slim.plan, state)
    fresh = optimiser.init(slim.variables["params"])
    assert jax.tree.structure(small) == jax.tree.structure(fresh)
    expected = {path: np.shape(leaf) for path, leaf in trees.flatten(fresh).items()}
    found = {path: np.shape(leaf) for path, leaf in trees.flatten(small).items()}
    assert found == expected
    kept = jp.kept_indices(graph, slim.plan)
    checked = 0
    for path, leaf in trees.flatten(state).items():
        if np.ndim(leaf) == 4:
            layer = "/".join(path.split("/")[-2:])
            want = np.asarray(leaf)
            for axis, indices in kept.get(f"params/{layer}", {}).items():
                want = np.take(want, indices, axis)
            np.testing.assert_array_equal(trees.flatten(small)[path], want)
            checked += 1
    assert checked >= 2


def _adafactor_case(least):
    x = jnp.ones((2, 6))
    rng = np.random.default_rng(0)
    params = {
        "a": {"kernel": jnp.asarray(rng.normal(size=(6, 12)), jnp.float32)},
        "b": {"kernel": jnp.asarray(rng.normal(size=(12, 8)), jnp.float32)},
    }

    def model(p, x):
        return jax.nn.relu(x @ p["a"]["kernel"]) @ p["b"]["kernel"]

    graph = jp.trace(model, params, x)
    (group,) = graph.groups
    slim = jp.shrink(graph, {group.name: np.arange(0, 12, 2)})
    optimiser = optax.scale_by_factored_rms(min_dim_size_to_factor=least)
    _, state = optimiser.update(params, optimiser.init(params), params)
    return graph, slim, optimiser, state


def test_factored_moments_lose_what_their_other_axis_loses():
    graph, slim, _, state = _adafactor_case(2)
    small = jp.shrink_like(graph, slim.plan, state)
    kept = {"a": (slice(None), slice(0, 12, 2)), "b": (slice(0, 12, 2), slice(None))}
    for name, where in kept.items():
        shape = graph.variables[name]["kernel"].shape
        pairs = (state, shape), (small, slim.variables[name]["kernel"].shape)
        whole, left = (_second_moments(s, name, size) for s, size in pairs)
        np.testing.assert_allclose(left, whole[where], rtol=1e-5)


def _second_moments(state, name, shape):
    """As optax multiplies rows, which lack the largest axis, and columns."""
    rows, columns = (np.asarray(v[name]["kernel"]) for v in (state.v_row, state.v_col))
    assert rows.shape + columns.shape == (min(shape), max(shape))
    outer = np.outer(rows, columns) / rows.mean()
    return outer.T if np.argsort(shape)[-1] == 0 else outer


@pytest.mark.parametrize("left", [(6, 8), (5, 4), (4, 6), (6, 6)])
def test_factored_moments_where_another_axis_is_the_largest_now(left):
    params = {
        name: {
            "kernel": jnp.asarray(np.random.default_rng(0).random(shape), jnp.float32)
        }
        for name, shape in {"a": (7, 12), "b": (12, 8), "c": (8, 5)}.items()
    }

    def model(p, x):
        return (
            jnp.tanh(jnp.tanh(x @ p["a"]["kernel"]) @ p["b"]["kernel"])
            @ p["c"]["kernel"]
        )

    graph = jp.trace(model, params, jnp.ones((2, 7)))
    slim = jp.shrink(
        graph,
        {g.name: np.arange(left[g.size == 8]) for g in graph.groups},
    )
    optimiser = optax.scale_by_factored_rms(min_dim_size_to_factor=2)
    _, state = optimiser.update(params, optimiser.init(params), params)
    like = optimiser.init(slim.variables)
    for small in (
        jp.shrink_like(graph, slim.plan, state),
        jp.shrink_like(graph, slim.plan, state, like=like),
    ):
        assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, like)
        found = _second_moments(small, "b", left)
        whole = _second_moments(state, "b", (12, 8))
        np.testing.assert_allclose(found, whole[: left[0], : left[1]], rtol=1e-5)


@pytest.mark.parametrize("least", [2, 7])
def test_moments_are_refactored_where_the_slim_array_is_factored_otherwise(least):
    """(6, 12) -> (6, 6) and (12, 8) -> (6, 8): the order of the axes flips, and with
    least=7 the slim arrays are not factored at all."""
    graph, slim, optimiser, state = _adafactor_case(least)
    fresh = optimiser.init(slim.variables)
    small = jp.shrink_like(graph, slim.plan, state, like=fresh)
    assert jax.tree.map(jnp.shape, small) == jax.tree.map(jnp.shape, fresh)
    optimiser.update(slim.variables, small, slim.variables)
    rows, columns = (np.asarray(v["b"]["kernel"]) for v in (state.v_row, state.v_col))
    if least == 7:
        # v_row (8,) is the mean over the 12, v_col (12,) over the 8.
        outer = columns[::2, None] * rows[None, :]
        np.testing.assert_allclose(
            small.v["b"]["kernel"], outer / rows.mean(), rtol=1e-5
        )
    other = optax.adam(1e-2).init(slim.variables)
    with pytest.raises(GraphError, match="pass the plan of the slim model"):
        jp.shrink_like(
            graph, graph.full_plan(), optax.adam(1e-2).init(graph.variables), like=other
        )


class _Attends(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(2, qkv_features=16, use_bias=False)(x)
        return nn.Dense(3)(x)


@pytest.fixture(scope="module")
def attention():
    """(graph, its model, variables with removed widths at zero, slim, x); the queries of
    the slim model are multiplied with sqrt(1/2)."""
    x = jax.random.normal(jax.random.key(0), (4, 6, 8))
    model = _Attends()
    variables = jax.tree.map(lambda a: 3 * a, model.init(jax.random.key(1), x))
    graph = jp.trace(model, variables, x)
    width = next(g for g in graph.groups if g.name.endswith("query.2"))
    plan = {width.name: np.arange(4)}
    masked = {p: np.array(leaf) for p, leaf in trees.flatten(variables).items()}
    for slot in width.slots:
        np.moveaxis(masked[slot.path], slot.axis, 0)[slot.index[4:].ravel()] = 0
    masked = trees.replace(variables, {p: jnp.asarray(v) for p, v in masked.items()})
    return graph, model, masked, jp.shrink(graph, plan), x


def test_averages_of_the_weights_take_what_the_kernels_took(attention):
    graph, _, _, slim, _ = attention
    assert slim.report["rescaled"]
    average = jax.tree.map(lambda a: 1.1 * a, graph.variables)
    for tree in (average, {"ema": average}, {"params": average["params"]}):
        small = jp.shrink_like(graph, slim.plan, tree)
        small = small.get("ema", small)
        for path, leaf in trees.flatten(small).items():
            want = 1.1 * trees.flatten(slim.variables)[path]
            np.testing.assert_allclose(leaf, want, rtol=1e-5)
    free = optax.contrib.schedule_free_adamw(1e-3).init(graph.variables["params"])
    small = jp.shrink_like(graph, slim.plan, free)
    jax.tree.map(
        np.testing.assert_array_equal, dict(small.z), dict(slim.variables["params"])
    )
    replayed = jp.shrink(graph, slim.plan, replay=True)
    small = jp.shrink_like(graph, slim.plan, average, replay=True)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, 1.1 * b, rtol=1e-6),
        small,
        replayed.variables,
    )


@pytest.mark.parametrize(
    "optimiser",
    [
        optax.scale_by_adam(),
        optax.trace(0.9),
        optax.scale_by_rss(initial_accumulator_value=0.0),
        optax.scale_by_amsgrad(),
        optax.scale_by_factored_rms(min_dim_size_to_factor=64),
    ],
    ids=["adam", "momentum", "adagrad", "amsgrad", "adafactor"],
)
def test_moments_are_those_of_the_slim_models_gradients(attention, optimiser):
    graph, model, masked, slim, x = attention

    def moments(model, params):
        def loss(params):
            return jnp.square(model.apply({"params": params}, x) - 1).mean()

        grads = jax.grad(loss)(params)
        return optimiser.update(grads, optimiser.init(params), params)[1]

    small = jp.shrink_like(graph, slim.plan, moments(model, masked["params"]))
    want = moments(slim.model, slim.variables["params"])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-7), small, want
    )


def test_an_optimiser_mirrors_the_parameters_and_no_other_collection():
    class Teaches(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3)(nn.relu(nn.Dense(12)(x)))

    x = jnp.ones((2, 5))
    variables = Teaches().init(jax.random.key(0), x)
    variables = {**variables, "teacher": variables["params"]}
    graph = jp.trace(Teaches(), variables, x)
    slim = jp.shrink(graph, {graph.groups[0].name: np.arange(6)})
    state = optax.scale_by_adam().init(variables["params"])
    small = jp.shrink_like(graph, slim.plan, state)
    want = jax.tree.map(jnp.shape, slim.variables["params"])
    assert jax.tree.map(jnp.shape, small.mu) == want


def test_leaves_are_told_apart_by_what_stands_in_front_of_all():
    """Adam's "mu/bias" is not the bias of the layer "mu"."""
    rng = np.random.default_rng(0)
    params = {
        "mu": {"kernel": rng.normal(size=(5, 12)), "bias": rng.normal(size=12)},
        "out": rng.normal(size=(12, 12)),
        "bias": rng.normal(size=12),
    }
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)

    def apply(p, x):
        h = jax.nn.relu(x @ p["mu"]["kernel"] + p["mu"]["bias"])
        return h @ p["out"] + p["bias"]

    graph = jp.trace(apply, params, jnp.ones((2, 5)))
    (group,) = graph.groups
    slim = jp.shrink(graph, {group.name: np.arange(0, 12, 2)})
    _, state = optax.scale_by_adam().update(params, optax.scale_by_adam().init(params))
    small = jp.shrink_like(graph, slim.plan, state)
    want = jax.tree.map(lambda a: 0.1 * a, slim.variables)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), small.mu, want
    )


def test_indices_are_of_whole_variables():
    graph, _, slim, _ = _pruned()
    kept = jp.kept_indices(graph, slim.plan)
    with pytest.raises(PlanError, match="expected a tree with .*/.*, found"):
        kept.take(graph.variables["params"])


def test_training_goes_on_where_it_was():
    """Dead channels go mid-training: the loss curve of the slim run is the same."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(64, 5)), jnp.float32)
    y = jnp.asarray(np.sin(2 * x[:, :1]) + x[:, 1:2] ** 2)
    params = {
        "a": {"w": jnp.asarray(rng.normal(size=(5, 16)) * 0.5, jnp.float32)},
        "b": {"w": jnp.asarray(rng.normal(size=(16, 1)) * 0.3, jnp.float32)},
        "bias": jnp.asarray(rng.normal(size=16) * 0.1, jnp.float32),
    }
    dead = np.array([2, 3, 11])
    params["bias"] = params["bias"].at[dead].set(-50.0)

    def model(p, x):
        return jax.nn.relu(x @ p["a"]["w"] + p["bias"]) @ p["b"]["w"]

    optimiser = optax.adam(3e-2)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: ((model(p, x) - y) ** 2).mean())(
            params
        )
        updates, state = optimiser.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    def train(params, state, steps):
        losses = []
        for _ in range(steps):
            params, state, loss = step(params, state)
            losses.append(float(loss))
        return params, state, losses

    params, state, before = train(params, optimiser.init(params), 40)
    _, _, straight = train(params, state, 40)
    graph = jp.trace(model, params, x)
    (group,) = graph.groups
    slim = jp.shrink(graph, {group.name: np.setdiff1d(np.arange(16), dead)})
    small = jp.shrink_like(graph, slim.plan, state)
    _, _, after = train(slim.variables, small, 40)
    assert before[-1] < 0.5 * before[0]
    np.testing.assert_allclose(after, straight, rtol=1e-4)
    # A fresh optimiser does jump: the comparison sees the difference.
    _, _, cold = train(slim.variables, optimiser.init(slim.variables), 40)
    assert max(np.abs(np.array(cold) / straight - 1)) > 0.02

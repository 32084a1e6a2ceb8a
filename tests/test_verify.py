"""The proof's own terms: the precision it runs at and the error it allows."""

import dataclasses
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify

import jaxprune as jp
from jaxprune.errors import EmissionError
from jaxprune.surgery import shrunk
from jaxprune.verify import masked_outputs

FLAT = jax.random.normal(jax.random.key(3), (6, 5))
X = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 8, 3)), jnp.float32)
PRECISION = "jax_default_matmul_precision"


def _narrow(dtype):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Conv(32, (3, 3), dtype=dtype, name="a")(x))
            x = nn.relu(nn.Conv(32, (3, 3), dtype=dtype, name="b")(x))
            return nn.Dense(4, dtype=jnp.float32, name="head")(x.mean((1, 2)))

    model = Net()
    return model, model.init(jax.random.key(0), X)


def _half(graph):
    return {group.name: np.arange(0, group.size, 2) for group in graph.groups}


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_networks_that_compute_in_coarse_floats_are_proven(dtype):
    model, variables = _narrow(dtype)
    if not jnp.isfinite(jax.jit(model.apply)(variables, X)).all():
        pytest.skip("XLA makes NaN of this network itself (jaxlib 0.11.2 on some CPUs)")
    graph = jp.trace(model, variables, X)
    eps = float(jnp.finfo(dtype).eps)
    assert jp.verify(graph, _half(graph), X) < 4 * eps
    batches = [(X, jnp.arange(4))] * 2
    slim = jp.prune(model, variables, batches, method="l1", macs=0.5)
    assert slim.report["verify_max_abs_error"] < 4 * eps
    assert slim.model.apply(slim.variables, X).dtype == jnp.float32


def test_the_error_allowed_is_of_the_coarsest_type(monkeypatch):
    """A rounding of bfloat16 passes in a network that has it, and in no other."""
    rounding = 0.004

    def shifted(*args, **kwargs):
        return [out + rounding for out in masked_outputs(*args, **kwargs)]

    monkeypatch.setitem(jp.verify.__globals__, "masked_outputs", shifted)
    model, variables = _narrow(jnp.bfloat16)
    graph = jp.trace(model, variables, X)
    assert jp.verify(graph, _half(graph), X) > rounding / 2
    with pytest.raises(jp.PruneError, match="differs from the masked original"):
        jp.verify(graph, _half(graph), X, tolerance=1e-4)
    model, variables = _narrow(jnp.float32)
    graph = jp.trace(model, variables, X)
    with pytest.raises(jp.PruneError, match="differs from the masked original"):
        jp.verify(graph, _half(graph), X)


def test_products_run_at_the_highest_precision():
    """Where the source leaves it open: a GPU's default is too coarse for a proof."""
    seen = []

    def apply(params, x):
        seen.append(getattr(jax.config, PRECISION))
        h = jax.nn.relu(x @ params["a"])
        return jnp.matmul(h, params["b"], precision=jax.lax.Precision.DEFAULT)

    rng = np.random.default_rng(0)
    params = {
        "a": jnp.asarray(rng.normal(size=(3, 6)), jnp.float32),
        "b": jnp.asarray(rng.normal(size=(6, 2)), jnp.float32),
    }
    graph = jp.trace(apply, params, X)
    plan = {"a": [0, 2, 5]}
    program = str(
        jax.make_jaxpr(lambda p: masked_outputs(graph, plan, p, (X,)))(params)
    )
    assert program.count("Precision.HIGHEST") == 2  # both operands of the first
    assert program.count("Precision.DEFAULT") == 2
    assert "highest" not in seen
    jp.verify(graph, plan, X)
    assert seen[-1] == "highest"
    assert getattr(jax.config, PRECISION) != "highest"


def test_a_replay_is_proven_without_a_smaller_module():
    class Own(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.Dense(6)(x).reshape(-1, 6))

        def resized(self, variables):
            raise ValueError("no module of these widths")

    model, x = Own(), jnp.ones((2, 3))
    graph = jp.trace(model, model.init(jax.random.key(0), x), x)
    plan = {g.name: np.arange(4) for g in graph.groups}
    assert jp.verify(graph, plan, x, replay=True) < 1e-5


@pytest.mark.parametrize("key", [jax.random.PRNGKey(4), jax.random.key(4)])
def test_noise_of_several_keys_is_drawn_at_the_slim_size(key):
    """Critics side by side under nn.vmap, each with a dropout of its own."""

    class Critic(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dropout(0.3, deterministic=False)(nn.relu(nn.Dense(12)(x)))
            return nn.Dense(1)(x)

    rngs = {"params": True, "dropout": True}
    model = nn.vmap(
        Critic, variable_axes={"params": 0}, split_rngs=rngs, in_axes=None, axis_size=2
    )()
    variables = model.init({"params": jax.random.key(0), "dropout": key}, FLAT)

    def apply(model, variables, x, key):
        return model.apply(variables, x, rngs={"dropout": key})

    graph = jp.trace(model, variables, (FLAT, key), apply=apply)
    plan = {group.name: np.arange(0, group.size, 3) for group in graph.groups}
    assert jp.verify(graph, plan, (FLAT, key)) < 1e-6
    assert len(plan) == 1


@pytest.mark.parametrize("replay", [False, True])
def test_models_that_assert_by_checkify_are_proven(replay):
    class Checked(nn.Module):
        @nn.compact
        def __call__(self, x):
            checkify.check(jnp.bool_(x.shape[1] == 5), "5 features expected")
            return nn.Dense(2)(nn.relu(nn.Dense(6)(x)))

    model = Checked()
    _, variables = checkify.checkify(lambda: model.init(jax.random.key(0), FLAT))()
    graph = jp.trace(model, variables, FLAT)
    (group,) = graph.groups
    slim = jp.shrink(graph, {group.name: [1, 4]}, replay=replay)
    assert slim.report["left_whole"] == {}
    assert jp.verify(graph, slim.plan, FLAT, replay=replay) < 1e-6
    labels = jnp.zeros(len(FLAT), int)
    slim = jp.prune(model, variables, [(FLAT, labels)], method="l1", keep=0.5)
    assert slim.plan[group.name].size == 3


class Deep(nn.Module):
    """Three layers of sines, which magnify what goes in some 30 times each, or without."""

    sines: bool

    @nn.compact
    def __call__(self, x):
        for _ in range(3):
            x = nn.Dense(16, kernel_init=nn.initializers.normal(1))(x)
            x = jnp.sin(30 * x) if self.sines else jnp.tanh(x)
        return nn.Dense(2)(x)


@pytest.mark.parametrize("sines", [True, False])
def test_a_network_that_magnifies_roundings_is_not_refused(monkeypatch, sines):
    """As if the slim program rounded otherwise, which depends on the machine; an error
    of that size in another network is a defect."""
    size = np.finfo(np.float32).eps if sines else 3e-4
    rng = np.random.default_rng(0)

    def moved(*args, **options):
        slim = shrunk(*args, **options)
        variables = jax.tree.map(
            lambda leaf: leaf * (1 + size * rng.uniform(-1, 1, leaf.shape)),
            slim.variables,
        )
        return dataclasses.replace(slim, variables=jax.tree.map(np.float32, variables))

    x = jax.random.normal(jax.random.key(0), (8, 3))
    model = Deep(sines)
    variables = model.init(jax.random.key(1), x)
    graph = jp.trace(model, variables, x)
    plan = {group.name: range(0, group.size, 2) for group in graph.groups}
    monkeypatch.setattr(sys.modules["jaxprune.verify"], "shrunk", moved)
    with pytest.raises(EmissionError, match="differs from the masked original"):
        jp.verify(graph, plan, x, tolerance=1e-4)
    if sines:
        assert 1e-4 < jp.verify(graph, plan, x) < 0.03
    else:
        with pytest.raises(EmissionError, match="differs from the masked original"):
            jp.verify(graph, plan, x)
        assert jp.verify(graph, plan, x, tolerance=0.03) < 0.03

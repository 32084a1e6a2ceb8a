"""Channels that are constant by their weights: removed without a change of the output."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import constants, trees

IMAGE = (2, 9, 9, 3)


class _Vgg(nn.Module):
    """BatchNorm, ReLU, pools, windows without padding, a flatten."""

    padding: str = "VALID"

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 3), use_bias=False, name="a")(x)
        x = nn.relu(nn.BatchNorm(True, name="bn_a")(x))
        x = nn.Conv(5, (3, 3), padding=self.padding, use_bias=False, name="b")(x)
        x = nn.gelu(nn.BatchNorm(True, name="bn_b")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.Conv(7, (1, 1), name="c")(x)
        x = nn.avg_pool(nn.swish(x), (2, 2))
        x = nn.Dense(8, name="hidden")(x.reshape(x.shape[0], -1))
        return nn.Dense(3, name="head")(nn.tanh(x))


class _Mlp(nn.Module):
    """A hidden layer with a zero column in its kernel, over tokens."""

    normed: bool = False
    shared: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Dense(8, name="a")(x))
        if self.normed:
            x = nn.LayerNorm(name="norm")(x)
        y = nn.Dense(4, name="b")(x)
        if self.shared:
            y = y + nn.Dense(4, use_bias=False, name="other")(jnp.exp(x))
        return nn.Dense(3, name="head")(nn.relu(y))


def _variables(model, x):
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    rng = np.random.default_rng(0)

    def one(path, leaf):
        noise = rng.normal(size=leaf.shape)
        name = path[-1].key
        if name in ("var", "scale", "bias"):  # a constant survives a ReLU
            noise = np.abs(noise) + (0.5 if name != "bias" else 0.1)
        return jnp.asarray(noise if name != "kernel" else 0.5 * noise, jnp.float32)

    return jax.tree_util.tree_map_with_path(one, shapes)


def _silence(variables, changes):
    """`changes`: {leaf: channels of its last axis that become zero}."""
    leaves = trees.flatten(variables)
    return trees.replace(
        variables,
        {p: leaves[p].at[..., np.array(k)].set(0) for p, k in changes.items()},
    )


def _plan(graph, leaf, removed):
    """The plan that removes these channels of the group that makes the leaf."""
    group = next(g for g in graph.groups if g.producers[0].path == leaf)
    return {group.name: np.setdiff1d(np.arange(group.size), removed)}


def _error(model, variables, plan, x, fold=True):
    graph = jp.trace(model, variables, x)
    moved = jp.fold_constants(graph, plan) if fold else variables
    slim = jp.shrink(graph, plan, moved)
    assert not slim.report["left_whole"]
    small = slim.model.apply(slim.variables, x)
    return float(jnp.abs(small - model.apply(variables, x)).max())


CASES = {
    "zero_scale_into_a_mean": ({"params/bn_a/scale": [1, 4]}, "params/a/kernel"),
    "zero_scale_into_a_bias": ({"params/bn_b/scale": [0, 2]}, "params/b/kernel"),
    "zero_column_through_a_flatten": ({"params/c/kernel": [3, 6]}, "params/c/kernel"),
    "zero_column_of_a_dense": ({"params/hidden/kernel": [2]}, "params/hidden/kernel"),
}


@pytest.mark.parametrize("name", list(CASES))
def test_the_slim_model_is_the_original_as_it_was(name):
    changes, leaf = CASES[name]
    model, x = _Vgg(), jax.random.normal(jax.random.key(1), IMAGE)
    variables = _silence(_variables(model, x), changes)
    graph = jp.trace(model, variables, x)
    plan = _plan(graph, leaf, next(iter(changes.values())))
    assert _error(model, variables, plan, x, fold=False) > 1e-3
    assert _error(model, variables, plan, x) < 2e-5


def test_all_groups_at_once():
    model, x = _Vgg(), jax.random.normal(jax.random.key(1), IMAGE)
    changes = {k: v for c, _ in CASES.values() for k, v in c.items()}
    variables = _silence(_variables(model, x), changes)
    graph = jp.trace(model, variables, x)
    plan = {}
    for change, leaf in CASES.values():
        plan |= _plan(graph, leaf, next(iter(change.values())))
    assert _error(model, variables, plan, x, fold=False) > 1e-3
    assert _error(model, variables, plan, x) < 2e-5


def test_tokens():
    model, x = _Mlp(), jax.random.normal(jax.random.key(1), (2, 5, 6))
    variables = _silence(_variables(model, x), {"params/a/kernel": [0, 5, 7]})
    plan = _plan(jp.trace(model, variables, x), "params/a/kernel", [0, 5, 7])
    assert _error(model, variables, plan, x, fold=False) > 1e-3
    assert _error(model, variables, plan, x) < 2e-5


def _changed(model, variables, plan, x):
    graph = jp.trace(model, variables, x)
    before, after = (
        trees.flatten(variables),
        trees.flatten(jp.fold_constants(graph, plan, variables)),
    )
    return [p for p in before if not np.array_equal(before[p], after[p])]


def test_what_is_not_exact_is_left_alone():
    """Padding sees zeros, a norm runs over channels, a channel that is no constant."""
    x = jax.random.normal(jax.random.key(1), IMAGE)
    padded = _Vgg("SAME")
    variables = _silence(_variables(padded, x), {"params/bn_a/scale": [1]})
    plan = _plan(jp.trace(padded, variables, x), "params/a/kernel", [1])
    assert _changed(padded, variables, plan, x) == []
    variables = _variables(padded, x)
    plan = _plan(jp.trace(padded, variables, x), "params/hidden/kernel", [1])
    assert _changed(padded, variables, plan, x) == []
    x = jax.random.normal(jax.random.key(1), (2, 5, 6))
    normed = _Mlp(normed=True)
    variables = _silence(_variables(normed, x), {"params/a/kernel": [0]})
    plan = _plan(jp.trace(normed, variables, x), "params/a/kernel", [0])
    assert _changed(normed, variables, plan, x) == []


class _Weighted(nn.Module):
    """A kernel that is computed from weights, norms over its inputs included."""

    kind: str

    @nn.compact
    def __call__(self, x):
        h = nn.gelu(nn.Dense(8, name="a")(x))
        if self.kind == "weight_norm":
            h = nn.WeightNorm(nn.Dense(6))(h)
        elif self.kind == "spectral_norm":
            h = nn.SpectralNorm(nn.Dense(6))(h, update_stats=False)
        else:
            w = self.param("w", nn.initializers.normal(1.0), (h.shape[-1], 6))
            h = h @ (w - w.mean(0)) + self.param("b", nn.initializers.zeros, 6)
        return nn.Dense(3)(jnp.tanh(h))


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm", "standardised"])
def test_a_kernel_whose_norm_reads_the_channel_is_left_alone(kind):
    model, x = _Weighted(kind), jax.random.normal(jax.random.key(1), (2, 6, 5))
    variables = _silence(_variables(model, x), {"params/a/kernel": [2]})
    variables["params"]["a"]["bias"] = jnp.full(8, 0.7)
    plan = _plan(jp.trace(model, variables, x), "params/a/kernel", [2])
    assert _changed(model, variables, plan, x) == []


@pytest.mark.parametrize("reduce", [jax.lax.add, jax.lax.max])
def test_windows_over_holes_pass_no_constant_on(reduce):
    """Of two entries of a window one is a hole."""
    start = 0.0 if reduce is jax.lax.add else -jnp.inf

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(8, name="a")(x)
            h = jax.lax.reduce_window(
                h, start, reduce, (1, 2, 1), (1, 1, 1), "VALID", base_dilation=(1, 2, 1)
            )
            return nn.Dense(3)(nn.Dense(6)(h))

    model, x = Net(), jax.random.normal(jax.random.key(1), (2, 6, 5))
    variables = _silence(_variables(model, x), {"params/a/kernel": [2]})
    plan = _plan(jp.trace(model, variables, x), "params/a/kernel", [2])
    assert _changed(model, variables, plan, x) == []


def test_all_readers_or_none():
    """The second reader has no bias: a channel that both read stays owed."""
    model, x = _Mlp(shared=True), jax.random.normal(jax.random.key(1), (2, 5, 6))
    variables = _silence(_variables(model, x), {"params/a/kernel": [0, 3]})
    plan = _plan(jp.trace(model, variables, x), "params/a/kernel", [0, 3])
    assert _changed(model, variables, plan, x) == []


def test_a_constant_that_is_zero_needs_nothing():
    """After the ReLU of a negative shift: zero, under any padding."""
    model, x = _Vgg("SAME"), jax.random.normal(jax.random.key(1), IMAGE)
    variables = _silence(_variables(model, x), {"params/bn_a/scale": [1]})
    leaves = trees.flatten(variables)
    shift = leaves["params/bn_a/bias"].at[1].set(-2.0)
    variables = trees.replace(variables, {"params/bn_a/bias": shift})
    plan = _plan(jp.trace(model, variables, x), "params/a/kernel", [1])
    assert _changed(model, variables, plan, x) == []
    assert _error(model, variables, plan, x) < 2e-5


def test_a_fold_of_the_wrong_sign_is_found(monkeypatch):
    right = constants._Walk.deltas
    monkeypatch.setattr(
        constants._Walk,
        "deltas",
        lambda walk: {path: -delta for path, delta in right(walk).items()},
    )
    with pytest.raises(AssertionError):
        test_the_slim_model_is_the_original_as_it_was("zero_scale_into_a_mean")


def test_shapes_alone_are_refused():
    model, x = _Mlp(), jax.random.normal(jax.random.key(1), (2, 5, 6))
    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    graph = jp.trace(model, shapes, x)
    with pytest.raises(jp.PruneError, match="expected an array at params/a"):
        jp.fold_constants(graph, {})

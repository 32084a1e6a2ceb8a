"""importance_redundancy: planted channels go, each repair is a switch, the seed's ratio."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import models
from jaxprune.errors import ConfigError, ScoreError
from jaxprune.methods.seed_ratio import seed_layers, seed_ratio


class _Planted(nn.Module):
    """Ten hidden channels; the tests make some copies of others, or dead."""

    @nn.compact
    def __call__(self, x, train=False):
        del train
        x = nn.relu(nn.Conv(10, (3, 3), padding="VALID", name="a")(x))
        x = nn.Conv(6, (3, 3), padding="VALID", name="b")(x)
        return nn.Dense(4, name="c")(nn.relu(x).mean((1, 2)))


def _planted():
    model = _Planted()
    x = np.random.default_rng(3).normal(size=(64, 9, 9, 3)).astype(np.float32)
    variables = jax.tree.map(np.array, model.init(jax.random.key(0), x[:1]))
    kernel, bias = (variables["params"]["a"][k] for k in ("kernel", "bias"))
    bias[:] = 0.1
    kernel[..., 7], bias[7] = kernel[..., 2], bias[2]  # a duplicate
    kernel[..., 8], bias[8] = 2.5 * kernel[..., 4], 2.5 * bias[4]  # scaled
    kernel[..., 9], bias[9] = 0.0, 0.7  # constant
    return model, jax.tree.map(jnp.asarray, variables), x


@pytest.mark.parametrize("refit", ["lstsq", "none"])
def test_planted_twins_go_and_the_output_stays(refit):
    model, variables, x = _planted()
    if refit == "none":  # folding alone: twins, and no constant
        bias = variables["params"]["a"]["bias"].at[9].set(-1.0)
        variables["params"]["a"]["bias"] = bias
    slim = jp.prune(
        model, variables, [(x, None)], method="importance_redundancy", keep=0.7,
        ignore=["b"], similarity_threshold=0.99, refit=refit, ridge=0.0,
    )  # fmt: skip
    kept = set(slim.plan["a"].tolist())
    assert len(kept) == 7 and 9 not in kept
    assert len(kept & {2, 7}) == len(kept & {4, 8}) == 1
    outputs = model.apply(variables, x), slim.model.apply(slim.variables, x)
    np.testing.assert_allclose(*outputs, atol=1e-4)


def test_the_preset_reports_the_ratio_of_its_own_formula():
    model = models.create("vgg16_seed", width=0.0625)
    x = jnp.zeros((1, 32, 32, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), x)
    graph = jp.trace(model, variables, x)
    layers = seed_layers(graph, graph.full_plan())
    widths = [4, 4, 8, 8, *[16] * 3, *[32] * 6]
    space = [32, 32, 16, 16, *[8] * 3, *[4] * 3, *[2] * 3]
    assert [layer.kind for layer in layers] == ["conv"] * 13 + ["dense"] * 2
    assert [layer.outputs for layer in layers] == [*widths, 256, 256]
    assert [layer.inputs for layer in layers] == [3, *widths, 256]
    assert [layer.height for layer in layers] == [*space, 1, 1]
    assert {layer.kernel for layer in layers[:13]} == {3}

    rng = np.random.default_rng(0)
    plan = graph.complete(
        {g.name: np.sort(rng.permutation(g.size)[: g.size // 2]) for g in graph.groups}
    )
    kept = [len(plan[name]) for name in plan]
    before = after = 1
    channels, wide = 3, 3
    for width, k, side in zip(widths, kept, space, strict=False):
        before += 9 * wide * side * side * width
        after += 9 * channels * side * side * k
        wide, channels = width, k
    before += 32 * 256 + 256 * 256
    after += channels * 4 * kept[13] + kept[13] * kept[14]
    assert seed_ratio(graph, plan) == before / after

    model, variables, x = _planted()
    slim = jp.prune(
        model, variables, [(x, None)], method="importance_redundancy", preset="seed"
    )
    assert slim.report["seed_ratio"] == seed_ratio(
        jp.trace(model, variables, x), slim.plan
    )


class _Tanh(nn.Module):
    """An odd activation: a negated filter gives a negated channel."""

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(12, name="a")(x))
        x = jnp.tanh(nn.Dense(12, name="b")(x))
        return nn.Dense(4, name="c")(x)


def _negated():
    """In both layers 7 copies 2, 8 is minus 4, 9 minus 2, 10 is dead."""
    x = np.random.default_rng(3).normal(size=(256, 6)).astype(np.float32)
    variables = jax.tree.map(np.array, _Tanh().init(jax.random.key(0), x[:1]))
    for layer in "ab":
        kernel = variables["params"][layer]["kernel"]
        kernel[:, 7], kernel[:, 8], kernel[:, 9] = (
            kernel[:, 2],
            -kernel[:, 4],
            -kernel[:, 2],
        )
        kernel[:, 10] = 0.0
    return _Tanh(), jax.tree.map(jnp.asarray, variables), x


def test_planted_copies_negatives_and_dead_channels_go_by_thresholds_alone():
    model, variables, x = _negated()
    slim = jp.prune(
        model, variables, [(x, None)], method="importance_redundancy",
        similarity_threshold=0.999, refit="none",
    )  # fmt: skip
    for layer in "ab":
        kept = set(slim.plan[layer].tolist())
        assert len(kept) == 8 and 10 not in kept
        assert len(kept & {2, 7, 9}) == len(kept & {4, 8}) == 1
    outputs = model.apply(variables, x), slim.model.apply(slim.variables, x)
    np.testing.assert_allclose(*outputs, atol=1e-4)


@pytest.mark.parametrize(
    ("limits", "counts"),
    [
        ({}, (8, 8)),
        ({"round_to": 5}, (10, 10)),
        ({"min_keep": {"b": 9}}, (8, 9)),
        ({"min_ratio": 0.75}, (9, 9)),
        ({"overrides": {"a": 0.5}}, (6, 8)),
    ],
)
def test_thresholds_alone_keep_within_the_limits(limits, counts):
    model, variables, x = _negated()
    slim = jp.prune(
        model, variables, [(x, None)], method="importance_redundancy",
        similarity_threshold=0.999, **limits,
    )  # fmt: skip
    assert (slim.plan["a"].size, slim.plan["b"].size) == counts


@pytest.mark.parametrize(
    ("changes", "count", "exact"),
    [
        ({"fold": False}, 8, False),
        ({"pairing": "pairs"}, 9, True),  # the cluster of three keeps two
        ({"importance": "l1"}, 8, True),
        ({"importance": "taylor"}, 8, True),
        ({"spatial": False}, 8, True),
        ({"bins": "range", "entropy_threshold": 0.0}, 9, True),  # the dead one stays
        ({"entropy_threshold": 0.0}, 9, True),
        ({"fold": False, "refit": "lstsq", "ridge": 0.0, "positions": None}, 8, True),
    ],
)
def test_each_repair_is_a_switch_of_its_own(changes, count, exact):
    model, variables, x = _negated()
    y = np.random.default_rng(0).integers(0, 4, len(x))
    options = {"similarity_threshold": 0.999, "refit": "none", **changes}
    slim = jp.prune(
        model, variables, [(x, y)], method="importance_redundancy", **options
    )
    assert {len(kept) for kept in slim.plan.values()} == {count}
    outputs = model.apply(variables, x), slim.model.apply(slim.variables, x)
    gap = float(jnp.abs(outputs[0] - outputs[1]).max())
    assert gap < 1e-4 if exact else gap > 1e-2


def test_the_more_important_twin_survives_by_any_criterion():
    model, variables, x = _negated()
    importance = jp.score(jp.trace(model, variables, x), variables, "l1")["a"]
    slim = jp.prune(
        model, variables, [(x, None)], method="importance_redundancy",
        similarity_threshold=0.999, importance="l1",
    )  # fmt: skip
    best = max((2, 7, 9), key=lambda c: (importance[c], -c))
    assert best in slim.plan["a"]
    with pytest.raises(ScoreError, match="no criterion 'l3'"):
        jp.prune(
            model, variables, [(x, None)], method="importance_redundancy",
            importance="l3",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"bins": "even"}, "bins must be 'shared' or 'range'; found 'even'"),
        ({"pairing": "triples"}, "pairing must be 'clusters' or 'pairs'"),
        ({"preset": "sed"}, "preset must be 'seed', or None; found 'sed'"),
        ({"preset": "seed", "fold": False}, "fixes fold: leave out the preset"),
        ({"preset": "seed", "macs": 0.5}, "leave out macs"),
    ],
)
def test_wrong_options_of_importance_redundancy_are_named(options, error):
    model, variables, x = _negated()
    with pytest.raises(ConfigError, match=error):
        jp.prune(
            model, variables, [(x, None)], method="importance_redundancy", **options
        )


@pytest.mark.parametrize(
    ("method", "options"),
    [("cpli", {"mu": 0.0, "feature_importance": False}), ("lasso", {})],
)
def test_a_constant_channel_goes_first_and_into_the_bias(method, options):
    model, variables, x = _planted()
    slim = jp.prune(
        model, variables, [(x, None)], method=method, keep=0.9, ignore=["b"],
        ridge=0.0, allocation="uniform", positions=None, **options,
    )  # fmt: skip
    assert slim.plan["a"].tolist() == list(range(9))
    outputs = model.apply(variables, x), slim.model.apply(slim.variables, x)
    np.testing.assert_allclose(*outputs, atol=1e-4)

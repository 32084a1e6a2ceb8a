"""Every criterion against a naive float64 version, and its invariances."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune.criteria import CRITERIA, criterion
from jaxprune.criteria import activations as act
from jaxprune.criteria import gradients as grad
from jaxprune.criteria import weights as wei
from jaxprune.criteria.redundancy import range_edges, shared_edges
from jaxprune.criteria.slots import group_sum, slot_values
from jaxprune.errors import ScoreError
from jaxprune.records import Group, Slot
from jaxprune.stats import activations as stats

C = 6
OUT, IN = "params/conv/kernel", "params/next/kernel"
GAMMA, MEAN = "params/bn/scale", "batch_stats/bn/mean"


def each(size=C):
    return np.arange(size)[:, None]


def network(seed=0):
    """A conv (3, 3, 4, 6), its BatchNorm, a flattened Dense of 4 places a channel."""
    rng = np.random.default_rng(seed)
    flat = np.arange(4)[None] * C + each()  # (C, 4): where a channel lies when flat
    group = Group(
        "conv",
        C,
        (
            Slot(OUT, 3, each(), "producer"),
            Slot("params/conv/bias", 0, each()),
            Slot(GAMMA, 0, each()),
            Slot(MEAN, 0, each()),
            Slot(IN, 0, flat, "consumer"),
            Slot(IN, 0, flat, "consumer"),  # the layer is called twice
        ),
    )
    shapes = {
        OUT: (3, 3, 4, C), "params/conv/bias": (C,), GAMMA: (C,), MEAN: (C,),
        IN: (4 * C, 5),
    }  # fmt: skip
    leaves = {p: rng.normal(size=s).astype("f4") for p, s in shapes.items()}
    grads = {
        p: rng.normal(size=(7, *s)).astype("f4") for p, s in shapes.items() if p != MEAN
    }
    return group, leaves, grads


def naive_rows(leaves, c, paths=(OUT, IN)):
    parts = {
        OUT: lambda a: a[..., c],
        IN: lambda a: a.reshape(*a.shape[:-2], 4, C, 5)[..., c, :],
    }
    return np.concatenate(
        [
            parts.get(p, lambda a: a[..., c])(leaves[p].astype(np.float64)).ravel()
            for p in paths
        ]
    )


def rows(leaves, paths=(OUT, IN)):
    return np.stack([naive_rows(leaves, c, paths) for c in range(C)])


ALL = (OUT, "params/conv/bias", GAMMA, IN)


def test_slot_values_are_the_channel():
    group, leaves, _ = network()
    values = slot_values(leaves[IN], group.slots[4])
    assert values.shape == (C, 4, 5)
    np.testing.assert_array_equal(values[2], leaves[IN].reshape(4, C, 5)[:, 2])
    np.testing.assert_array_equal(
        slot_values(leaves[OUT], group.slots[0])[3].ravel(), leaves[OUT][..., 3].ravel()
    )


def test_nothing_is_counted_twice():
    """A square recurrent kernel is entered by both axes: union, not sum."""
    rng = np.random.default_rng(0)
    kernel = rng.uniform(size=(C, 3, C)).astype("f4")
    path = "params/cell/kernel"
    group = Group(
        "cell",
        C,
        (Slot(path, 2, each(), "producer"), Slot(path, 0, each(), "consumer")),
    )
    found = group_sum(group, {path: kernel})
    union = [
        kernel[c].sum() + kernel[..., c].sum() - kernel[c, :, c].sum() for c in range(C)
    ]
    np.testing.assert_allclose(found, union, rtol=1e-5)
    twice = [kernel[c].sum() + kernel[..., c].sum() for c in range(C)]
    assert np.abs(found - np.array(twice)).min() > 0.1


def test_weight_criteria_against_numpy():
    group, leaves, _ = network()
    w = rows(leaves)
    np.testing.assert_allclose(wei.l1(group, leaves), np.abs(w).sum(1), rtol=1e-5)
    np.testing.assert_allclose(
        wei.l2(group, leaves), np.linalg.norm(w, axis=1), rtol=1e-5
    )
    filters = rows(leaves, (OUT,))
    np.testing.assert_allclose(
        wei.l1(group, leaves, roles=("producer",)), np.abs(filters).sum(1), rtol=1e-5
    )
    distances = np.linalg.norm(filters[:, None] - filters[None], axis=-1).sum(1)
    np.testing.assert_allclose(wei.fpgm(group, leaves), distances, rtol=1e-4)
    np.testing.assert_allclose(wei.bn_scale(group, leaves), np.abs(leaves[GAMMA]))
    energy = (w**2).sum(1)
    share = [e / energy[energy >= e].sum() for e in energy]
    np.testing.assert_allclose(wei.lamp(group, leaves), share, rtol=1e-5)
    assert float(wei.lamp(group, leaves).max()) == 1


def test_statistics_and_missing_slots():
    group, leaves, _ = network()
    only = Group("conv", C, (Slot(MEAN, 0, each()), Slot(OUT, 3, each(), "producer")))
    changed = {**leaves, MEAN: leaves[MEAN] * 1000}
    np.testing.assert_array_equal(wei.l1(only, leaves), wei.l1(only, changed))
    np.testing.assert_array_equal(
        group_sum(only, leaves), group_sum(only, {OUT: leaves[OUT]})
    )
    with pytest.raises(ScoreError, match="'conv' has no norm with a scale"):
        wei.bn_scale(only, leaves)
    with pytest.raises(ScoreError, match="'conv' has no consumer among the arrays"):
        grad.gate_gain(only, leaves, {OUT: leaves[OUT]})
    with pytest.raises(ScoreError, match="no criterion 'l3'; there are"):
        criterion("l3")
    del group


def test_random_differs_by_group_and_key():
    group, leaves, _ = network()
    other = Group("conv2", C, group.slots)
    key = jax.random.key(0)
    draws = [wei.random(g, leaves, key=key) for g in (group, group, other)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert np.abs(draws[0] - draws[2]).min() > 0
    assert np.abs(draws[0] - wei.random(group, leaves, key=jax.random.key(1))).min() > 0


def test_gradient_criteria_against_numpy():
    group, leaves, example = network()
    mean = {p: g.mean(0) for p, g in example.items()}
    w, g = rows(leaves, ALL), rows(mean, ALL)
    per = np.stack([rows({p: a[i] for p, a in example.items()}, ALL) for i in range(7)])
    gates = (w * per).sum(-1)  # (B, C)
    expected = {
        "taylor": np.abs((w * g).sum(1)),
        "taylor_examples": np.abs(gates).mean(0),
        "fisher": 0.5 * (gates**2).mean(0),
        "hessian": 0.5 * (w**2 * (per**2).mean(0)).sum(1),
        "gate_gain": -(rows(leaves, (IN,)) * rows(mean, (IN,))).sum(1),
    }
    for name, values in expected.items():
        entry = CRITERIA[name]
        given = mean if entry.needs == "gradients" else example
        np.testing.assert_allclose(
            entry.fn(group, leaves, given), values, rtol=2e-4, atol=1e-5, err_msg=name
        )
    batch = {p: a.mean(0, keepdims=True) for p, a in example.items()}
    wrong = grad.hessian(group, leaves, batch)  # squared mean, not mean square
    assert np.abs(wrong - expected["hessian"]).min() > 0.1
    np.testing.assert_allclose(
        grad.gate_gain_examples(group, leaves, {IN: example[IN][:1]}),
        np.abs((rows(leaves, (IN,)) * rows({IN: example[IN][0]}, (IN,))).sum(1)),
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip


def gated_loss(params, gates, x, y):
    hidden = jax.nn.relu(x @ params["a"] + params["c"]) * gates
    logits = hidden @ params["b"]
    return -jnp.take_along_axis(jax.nn.log_softmax(logits), y[:, None], 1).mean()


def test_gate_gain_is_the_gradient_of_a_real_gate():
    rng = np.random.default_rng(0)
    shapes = (("a", (4, C)), ("b", (C, 3)), ("c", (C,)))
    params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes}
    x, y = jnp.asarray(rng.normal(size=(50, 4)), jnp.float32), rng.integers(0, 3, 50)
    group = Group("a", C, (Slot("a", 1, each(), "producer"), Slot("c", 0, each()),
                           Slot("b", 0, each(), "consumer")))  # fmt: skip
    by_param, by_gate = jax.grad(gated_loss, (0, 1))(params, jnp.ones(C), x, y)
    found = grad.gate_gain(group, params, by_param)
    np.testing.assert_allclose(found, -by_gate, atol=1e-6)
    # ReLU is homogeneous: gating the producer and its bias is the same gate.
    ahead = grad.gate_gradient(group, params, by_param, roles=("producer", "other"))
    np.testing.assert_allclose(ahead, by_gate, atol=1e-6)


def test_invariance_to_the_scale_of_a_pair_and_to_order():
    group, leaves, example = network()
    scaled, scaled_g = dict(leaves), dict(example)
    for path, factor in ((OUT, 4.0), (IN, 0.25)):
        scaled[path] = leaves[path] * factor
        scaled_g[path] = example[path] / factor
    perm = np.random.default_rng(1).permutation(C)
    turned = Group(
        "conv",
        C,
        tuple(Slot(s.path, s.axis, s.index[perm], s.role) for s in group.slots),
    )
    for name in ("taylor_examples", "fisher", "hessian", "gate_gain_examples"):
        base = CRITERIA[name].fn(group, leaves, example)
        again = CRITERIA[name].fn(group, scaled, scaled_g)
        np.testing.assert_allclose(again, base, rtol=1e-5, err_msg=name)
        np.testing.assert_allclose(
            CRITERIA[name].fn(turned, leaves, example), base[perm], rtol=1e-5
        )
    assert np.abs(wei.l1(group, scaled) - wei.l1(group, leaves)).min() > 1
    for name in ("l1", "l2", "fpgm", "lamp", "bn_scale"):
        np.testing.assert_allclose(
            CRITERIA[name].fn(turned, leaves),
            CRITERIA[name].fn(group, leaves)[perm],
            rtol=1e-5,
        )


def feature_maps(seed=0, batch=20, side=5):
    rng = np.random.default_rng(seed)
    mixed = rng.normal(size=(batch, side, side, C)) @ rng.normal(size=(C, C))
    maps = np.maximum(mixed, 0)
    maps[..., 4] = 0  # dead
    maps[..., 5] *= 1e-3  # near dead
    return maps.astype("f4")


def test_activation_criteria_against_numpy():
    maps = feature_maps()
    flat = maps.reshape(-1, C).astype(np.float64)
    s = stats.stats_update(stats.stats_zeros(C), maps)
    np.testing.assert_allclose(act.activation_mean(s), np.abs(flat).mean(0), rtol=1e-5)
    np.testing.assert_allclose(act.activation_variance(s), flat.var(0), rtol=1e-4)
    np.testing.assert_allclose(act.apoz(s), (flat != 0).mean(0), rtol=1e-5)
    com = stats.comoments_update(stats.comoments_zeros(C), maps)
    alive = [0, 1, 2, 3, 5]
    matrix = np.abs(np.corrcoef(flat[:, alive].T))
    expected = -(matrix.sum(1) - 1) / (C - 1)
    found = act.correlation(com)
    np.testing.assert_allclose(found[alive], expected, atol=1e-5)
    assert found[4] == -1 == found.min()


def test_entropy_with_shared_bins_sees_small_channels():
    maps = feature_maps().astype(np.float32)
    s = stats.stats_update(stats.stats_zeros(C), maps)

    def entropies(edges):
        h = stats.histogram_update(stats.histogram_zeros(edges), maps)
        return act.entropy(h)

    edges = shared_edges(s.mean, s.variance)
    found = entropies(edges)
    flat = maps.reshape(-1, C)
    for c in range(C):
        p = np.bincount(np.digitize(flat[:, c].astype("f8"), edges[c])) / len(flat)
        p = p[p > 0]
        assert found[c] == pytest.approx(-(p * np.log(p)).sum(), abs=1e-9)
    assert found[4] == 0 and found[5] < 0.01 and found[:4].min() > 0.8
    own = entropies(range_edges(s.min, s.max))
    assert own[5] > 0.8  # bins on the channel's own range take it for alive


@pytest.mark.parametrize("side", [2, 5])  # H W below and above C
def test_channel_independence_against_numpy(side):
    maps = feature_maps(batch=3, side=side)
    expected = np.zeros(C)
    for image in maps.astype(np.float64):
        a = image.reshape(-1, C).T
        whole = np.linalg.svd(a, compute_uv=False).sum()
        for c in range(C):
            rest = np.delete(a, c, axis=0)
            expected[c] += (whole - np.linalg.svd(rest, compute_uv=False).sum()) / 3
    np.testing.assert_allclose(
        act.channel_independence(maps), expected, rtol=1e-3, atol=1e-4
    )
    assert abs(float(act.channel_independence(maps)[4])) < 1e-4


def test_groups_without_activations_are_named_with_what_keeps_them_whole():
    def apply(params, x):
        q, k, v = (x @ params[name] for name in "qkv")
        weights = jax.nn.softmax(q @ k.swapaxes(1, 2))
        return jnp.tanh(weights @ v) @ params["out"]

    rng = np.random.default_rng(0)
    shapes = {"q": (5, 6), "k": (5, 6), "v": (5, 8), "out": (8, 3)}
    params = {
        k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()
    }
    x = rng.normal(size=(4, 7, 5)).astype(np.float32)
    with pytest.raises(ScoreError, match=r"no activations.* ignore=\['\*q\*'\]"):
        jp.prune(apply, params, [x], method="entropy", keep=0.5, refit="none")
    slim = jp.prune(
        apply, params, [x], method="entropy", keep=0.5, refit="none", ignore=["*q*"]
    )
    assert [(name, len(kept)) for name, kept in slim.plan.items()] == [("v", 4)]


def test_every_criterion_is_registered_with_its_needs():
    assert {c.needs for c in CRITERIA.values()} == {
        "weights", "key", "gradients", "example_gradients", "stats", "histogram",
        "comoments", "maps",
    }  # fmt: skip
    assert all(c.fn.__doc__.startswith("(C,)") for c in CRITERIA.values())

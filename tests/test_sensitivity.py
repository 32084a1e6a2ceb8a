"""Widths by what the network loses: the loss that tells them apart, the joint check."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import runner
from jaxprune.methods.measure import Calibration, cross_entropy
from jaxprune.methods.sensitivity import divergence, sensitivity
from jaxprune.slicing import mask_variables

X = np.random.default_rng(0).normal(size=(64, 6)).astype(np.float32)


def _apply(params, x):
    h = jax.nn.relu(x @ params["a"])
    h = jax.nn.relu(h @ params["b"])
    return h @ params["out"] + params["bias"]


def _params(sure):
    rng = np.random.default_rng(1)
    shapes = {"a": (6, 12), "b": (12, 12), "out": (12, 4)}
    params = {
        k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()
    }
    # The first class wins everywhere: its softmax is 1 whatever is pruned.
    return params | {"bias": jnp.array([1000.0 * sure, 0, 0, 0])}


def test_what_two_outputs_of_a_regression_share_counts():
    """A softmax would not see it: both outputs move alike."""
    rng = np.random.default_rng(2)
    names = ("a", "b", "a_out", "b_out")
    shapes = ((3, 16), (3, 16), (16, 1), (16, 1))
    params = {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32)
        for name, shape in zip(names, shapes, strict=True)
    }

    def apply(params, x):
        a = jax.nn.relu(x[:, :3] @ params["a"]) @ params["a_out"]
        b = jax.nn.relu(x[:, 3:] @ params["b"]) @ params["b_out"]
        return jnp.concatenate([a + b, a - b], -1)

    def squared(outputs, y):
        return jnp.square(outputs - y).mean(-1)

    y = np.asarray(apply(params, X))
    counts = jp.prune(
        apply, params, [(X, y)], method="cpli", keep=0.5, loss_fn=squared, verify=False
    ).plan
    assert abs(len(counts["a"]) - len(counts["b"])) <= 4
    for labels, classes in ((y, False), (y.argmax(1), True), (None, True)):
        data = Calibration([(X, labels)])
        loss_fn = cross_entropy if classes else squared
        loss = divergence(jp.trace(apply, params, X), params, data, loss_fn)
        shared = loss({**params, "a_out": params["a_out"] * 1.5})
        assert (shared < 1e-3) == classes


@pytest.mark.parametrize("sure", [0.0, 1.0])
def test_a_larger_error_is_a_larger_loss_also_where_one_class_is_sure(sure):
    params = _params(sure)
    graph = jp.trace(_apply, params, X)
    loss = divergence(graph, params, Calibration([X]), cross_entropy)
    losses = [
        loss({**params, "b": params["b"].at[:, :gone].set(0)}) for gone in (0, 2, 8)
    ]
    assert 0 <= losses[0] < 1e-9
    assert losses[0] < losses[1] < losses[2]


def test_equal_shares_are_taken_where_the_network_loses_less_with_them(monkeypatch):
    """Curves that are wrong about every group cannot do harm."""
    params, asked = _params(0.0), {"macs": 0.5, "positions": None, "mu": 0.0}
    options = asked | {"feature_importance": False}

    def upside_down(probe, on_progress=None):
        del on_progress
        return {
            group.name: np.linspace(0.0, 1e-9, group.size + 1)
            * (1 if group.name == "a" else 1e6)
            for group in probe.groups
        }

    equal = jp.prune(_apply, params, [X], allocation="uniform", **options)
    monkeypatch.setattr(runner, "sensitivity", upside_down)
    slim = jp.prune(_apply, params, [X], **options)
    widths = [{n: len(k) for n, k in s.plan.items()} for s in (equal, slim)]
    assert widths[0] == widths[1]


def _attends(params, x):
    """One head over six tokens; what reads the features of q and k is their product."""
    q, k, v = (x[:, :, None] * params[name] + params[f"{name}_b"] for name in "qkv")
    return (jax.nn.softmax(q @ k.swapaxes(1, 2)) @ v).mean(1) @ params["out"]


def test_features_that_no_kernel_reads_are_silent_where_they_are_removed():
    rng = np.random.default_rng(3)
    shapes = {n: (8,) for n in ("q", "k", "v", "q_b", "k_b", "v_b")} | {"out": (8, 3)}
    params = {
        n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()
    }
    graph = jp.trace(_attends, params, X)
    (group,) = [g for g in graph.groups if not g.consumers]
    assert {slot.path for slot in group.slots} == {"q", "k", "q_b", "k_b"}
    plan = {group.name: [1, 4, 5]}
    masked = mask_variables(graph, plan, params)
    for name in ("q", "k", "q_b", "k_b"):
        expected = np.where(np.isin(np.arange(8), plan[group.name]), params[name], 0)
        np.testing.assert_array_equal(masked[name], expected)
    slim = jp.shrink(graph, plan)
    np.testing.assert_allclose(
        slim.model(slim.variables, X), _attends(masked, X), rtol=1e-5, atol=1e-6
    )


def test_widths_that_no_kernel_reads_are_missed(monkeypatch):
    """By the network's outputs: there is no layer to refit, and none whose error tells."""
    rng, curves = np.random.default_rng(3), {}
    params = {n: jnp.asarray(rng.normal(size=8), jnp.float32) for n in ("q", "k", "v")}
    params |= {f"{n}_b": jnp.zeros(8) for n in "qkv"}
    params["out"] = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)

    def recorded(probe, on_progress=None):
        curves.update(sensitivity(probe, on_progress))
        return curves

    monkeypatch.setattr(runner, "sensitivity", recorded)
    jp.prune(_attends, params, [X], method="lasso", macs=0.7)
    graph = jp.trace(_attends, params, X)
    (group,) = [g for g in graph.groups if not g.consumers]
    assert curves[group.name][1] > 1e-5


def _loud(several=False):
    """A network of which the first feature of q is large, of k next to nothing."""
    rng = np.random.default_rng(4)
    params = {n: jnp.asarray(rng.normal(size=8), jnp.float32) for n in ("q", "k", "v")}
    params |= {f"{n}_b": jnp.zeros(8) for n in "qkv"}
    params["out"] = jnp.asarray(rng.normal(size=(8, 3)), jnp.float32)
    params["q"] = params["q"].at[0].set(30.0)
    params["k"] = params["k"].at[0].set(1e-4)

    def apply(params, x):
        if several and x.shape[0] < 4:
            raise ValueError("four at least")
        return _attends(params, x)

    return apply, params


@pytest.mark.parametrize(
    ("several", "options", "stays"),
    [
        (False, {"method": "cpli"}, False),
        (False, {"method": "cpli", "mu": 0.0, "feature_importance": False}, True),
        (True, {"method": "cpli"}, True),  # it does not run on one example
    ],
)
def test_groups_that_no_kernel_reads_go_by_the_classification_loss(
    several, options, stays
):
    apply, params = _loud(several)
    y = np.random.default_rng(5).integers(0, 3, len(X))
    slim = jp.prune(apply, params, [(X, y)], keep=0.5, allocation="uniform", **options)
    graph = jp.trace(apply, params, X)
    (group,) = [g for g in graph.groups if not g.consumers]
    kept = slim.plan[group.name]
    assert len(kept) == 4 and (0 in kept) == stays
    if not stays:
        scores = jp.score(graph, params, "taylor_examples", batches=[(X, y)])
        best = np.argsort(-scores[group.name])[:4]
        np.testing.assert_array_equal(kept, np.sort(best))

"""Widths by what the network loses: the loss that tells them apart, the joint check."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import runner
from jaxprune.methods.measure import Calibration, cross_entropy
from jaxprune.methods.sensitivity import divergence

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

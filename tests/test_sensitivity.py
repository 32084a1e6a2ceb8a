"""Widths by what the network loses: the loss that tells them apart, the joint check."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import runner
from jaxprune.methods.measure import Calibration
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


@pytest.mark.parametrize("sure", [0.0, 1.0])
def test_a_larger_error_is_a_larger_loss_also_where_one_class_is_sure(sure):
    params = _params(sure)
    graph = jp.trace(_apply, params, X)
    loss = divergence(graph, params, Calibration([X]))
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

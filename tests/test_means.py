"""Sums divided by the number of their terms: means of the channels that are left."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

TOKENS = jax.random.normal(jax.random.key(1), (2, 6, 5))


@pytest.mark.parametrize(
    "mean",
    [
        lambda h: h.sum(-1, keepdims=True) / h.shape[-1],
        lambda h: h.var(-1, keepdims=True, ddof=1),
        lambda h: jnp.mean(jnp.square(h), (1, 2), keepdims=True),
    ],
)
def test_means_are_of_the_channels_that_are_left(mean):
    def model(params, x):
        h = jnp.tanh(x @ params["a"])
        return (h - mean(h)) @ params["b"]

    keys = jax.random.split(jax.random.key(0))
    params = {
        "a": jax.random.normal(keys[0], (5, 9)),
        "b": jax.random.normal(keys[1], (9, 3)),
    }
    graph = jp.trace(model, params, TOKENS)
    plan = {graph.groups[0].name: [0, 3, 4, 8]}
    slim, replayed = (jp.shrink(graph, plan, replay=r) for r in (False, True))
    assert slim.report["left_whole"] == {}
    np.testing.assert_allclose(
        slim.model(slim.variables, TOKENS),
        replayed.model(replayed.variables, TOKENS),
        atol=1e-5,
    )
    assert jp.verify(graph, plan, TOKENS) < 1e-5


def test_a_number_that_equals_a_count_by_chance_stays():
    """Half of a sum of two, a sum of three over two."""

    def model(params, x):
        h = x @ params["a"]
        return (h[..., :3].sum(-1) / 2 + 0.5 * (x @ params["b"]).sum(-1))[:, :1]

    keys = jax.random.split(jax.random.key(0))
    params = {
        "a": jax.random.normal(keys[0], (5, 3)),
        "b": jax.random.normal(keys[1], (5, 2)),
    }
    graph = jp.trace(model, params, TOKENS)
    plan = {"a": [1], "b": [0]}
    slim = jp.shrink(graph, plan, replay=True)
    silent = {
        "a": params["a"].at[:, [0, 2]].set(0.0),
        "b": params["b"].at[:, 1].set(0.0),
    }
    np.testing.assert_allclose(
        slim.model(slim.variables, TOKENS), model(silent, TOKENS), atol=1e-5
    )


@pytest.mark.parametrize("stated", [False, True])
def test_a_number_of_the_sources_own_may_equal_the_width(stated):
    """The source at the smaller size tells, where it can be traced there."""
    width, temperature = 8, 8.0

    def model(params, x):
        h = jnp.tanh(x @ params["a"])
        if stated:  # no smaller model can follow
            h = h.reshape(*h.shape[:-1], width)
        return h.sum(-1, keepdims=True) / temperature + h @ params["b"]

    keys = jax.random.split(jax.random.key(0))
    params = {
        "a": jax.random.normal(keys[0], (5, width)),
        "b": jax.random.normal(keys[1], (width, 3)),
    }
    graph = jp.trace(model, params, TOKENS)
    kept = np.array([0, 3, 4])
    slim = jp.shrink(graph, {graph.groups[0].name: kept}, replay=True)
    lines = slim.report["taken_for_means"]
    assert jp.verify(graph, slim.plan, TOKENS, replay=True) < 1e-5
    if stated:
        ((line, number),) = lines.items()
        assert line.startswith("test_means.py:") and number == temperature
        return
    assert lines == {}
    gone = np.setdiff1d(np.arange(width), kept)
    masked = {**params, "a": params["a"].at[:, gone].set(0)}
    np.testing.assert_allclose(
        slim.model(slim.variables, TOKENS), model(masked, TOKENS), atol=1e-5
    )


@pytest.mark.parametrize("written_out", [False, True])
def test_means_in_the_source_are_listed(written_out):
    def model(params, x):
        h = jnp.tanh(x @ params["a"])
        total = h.sum(-1, keepdims=True) / h.shape[-1]
        mean = total if written_out else h.mean(-1, keepdims=True)
        return (h - mean) @ params["b"]

    params = {"a": jnp.ones((5, 8)), "b": jnp.ones((8, 3))}
    graph = jp.trace(model, params, TOKENS)
    slim = jp.shrink(graph, {graph.groups[0].name: [0, 3]})
    assert jp.verify(graph, slim.plan, TOKENS) < 1e-5
    listed = slim.report["taken_for_means"]
    assert list(listed.values()) == ([8.0] if written_out else [])
    assert all(line.startswith("test_means.py:") for line in listed)

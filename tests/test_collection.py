"""Garbage collection is put off while a program is traced, and never longer."""

import gc

import jax.numpy as jnp
import pytest

import jaxprune as jp


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_as_it_was_after_a_trace(enabled):
    during = []

    def model(params, x):
        during.append(gc.isenabled())
        return jnp.tanh(x @ params["a"]) @ params["b"]

    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    was = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        graph = jp.trace(model, params, jnp.ones((2, 3)))
        jp.shrink(graph, {"a": [0, 2]})
        assert gc.isenabled() == enabled
        with pytest.raises(jp.PruneError):
            jp.trace(model, params, jnp.ones((2, 5)))
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if was else gc.disable)()
    assert during and not any(during)

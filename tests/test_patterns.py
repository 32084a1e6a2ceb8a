"""Patterns of real networks: traced, pruned at random, equal to the masked original."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from patterns import PATTERNS
from zoo import random_plan

import jaxprune as jp

# Sources that state a width (`reshape(..., 4, -1)` for heads): the group stays whole.
STATED = {
    "channel_shuffle": {"a"},
    "grouped_shuffle_in_whole_groups": {"stem.3"},
    "maxout": {"a.3"},
    "fused_qkv_by_split": {"qkv"},
    "fused_qkv_by_reshape": {"qkv"},
    "fused_qkv_within_heads": {"qkv"},
    "relative_positions": {"q"},
}


def make(name):
    model, shape, groups = PATTERNS[name]
    many = isinstance(shape, tuple) and isinstance(shape[0], tuple)
    keys = jax.random.split(jax.random.key(3), 4)
    x = tuple(
        jnp.asarray(s) if isinstance(s, np.ndarray) else jax.random.normal(k, s)
        for k, s in zip(keys, shape if many else (shape,), strict=False)
    )
    variables = jax.eval_shape(model.init, jax.random.key(0), *x)
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape, scale=0.4).astype(leaf.dtype)
        positive = path[-1].key in ("var", "scale")
        return jnp.asarray(0.5 + np.abs(noise) if positive else noise)

    variables = jax.tree_util.tree_map_with_path(draw, variables)
    return model, variables, x if many else x[0], groups


@pytest.mark.parametrize("name", list(PATTERNS))
def test_slim_equals_masked(name):
    model, variables, x, expected = make(name)
    graph = jp.trace(model, variables, x)
    found = [f"/{group.name.split('.')[0]}/" for group in graph.groups]
    missing = [g for g in expected if not any(f"/{g}/" in f for f in found)]
    assert not missing, f"{found}\n{graph}"
    for seed in range(2):
        plan = random_plan(graph, seed)
        left = jp.shrink(graph, plan).report["left_whole"]
        assert set(left) <= STATED.get(name, set()), left
        jp.verify(graph, plan, x, tolerance=1e-5)

"""Models at test size, random weights and random plans, shared by the tests."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import models
from jaxprune.stats import moments as mom

# Every reference architecture, narrow; (options, input shape).
ZOO: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "mlp": ({"hidden_widths": (12, 9)}, (10,)),
    "vgg_small": ({"width": 0.25}, (8, 8, 1)),
    "vgg16_seed": ({"width": 0.125, "hidden_widths": (24, 20)}, (32, 32, 3)),
    "cifar_vgg11": ({"width": 0.0625}, (32, 32, 3)),
    "cifar_vgg16_bn": ({"width": 0.0625}, (32, 32, 3)),
    "vgg11_bn": ({"width": 0.0625, "num_classes": 7}, (64, 64, 3)),
    "resnet20": ({"width": 0.5}, (16, 16, 3)),
    "resnet20_pad": ({"width": 0.5, "shortcut": "pad"}, (16, 16, 3)),
    "resnet18": ({"width": 0.125, "num_classes": 7}, (32, 32, 3)),
    "resnet50": ({"width": 0.125, "num_classes": 7}, (32, 32, 3)),
    "vit_cifar": ({"embed_width": 24, "depth": 2}, (16, 16, 3)),
    "vit_tiny": ({"embed_width": 24, "depth": 2, "num_classes": 7}, (32, 32, 3)),
}


def make(name: str) -> tuple[Any, Any, jax.Array]:
    """A model of the zoo, randomised variables and a batch of two."""
    options, shape = ZOO[name]
    model = models.create(name.removesuffix("_pad"), **options)
    x = jax.random.normal(jax.random.key(7), (2, *shape))
    return model, randomise(_init(model, x.shape)), x


@functools.lru_cache
def _init(model: Any, shape: tuple[int, ...]) -> Any:
    return jax.jit(model.init)(jax.random.key(0), jnp.zeros(shape))


def randomise(variables: Any, seed: int = 0) -> Any:
    """Variables moved off their initial values: no scale of 1, no shift of 0."""
    rng = np.random.default_rng(seed)

    def move(path: Any, leaf: Any) -> Any:
        noise = rng.normal(size=leaf.shape).astype(leaf.dtype)
        if path[-1].key in ("scale", "var"):
            return jnp.asarray(0.5 + np.abs(noise))
        if path[-1].key == "kernel":  # signals must survive 13 layers without BatchNorm
            return jnp.asarray(1.5 * np.asarray(leaf) + 0.02 * noise)
        return jnp.asarray(np.asarray(leaf) + 0.1 * np.abs(noise))

    return jax.tree_util.tree_map_with_path(move, variables)


def random_plan(graph: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """A random share of every group, at least one channel of each."""
    rng = np.random.default_rng(seed)
    plan = {}
    for group in graph.groups:
        count = rng.integers(1, group.size + 1)
        plan[group.name] = np.sort(rng.permutation(group.size)[:count])
    return plan


def random_batches(x_shape, classes=7, count=48, size=16, seed=0):
    """[(x (size, *x_shape), y (size,)), ...] of noise, the last smaller if need be."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(count, *x_shape)).astype(np.float32)
    y = rng.integers(0, classes, count)
    return [(x[i : i + size], y[i : i + size]) for i in range(0, count, size)]


def moments_of(x: np.ndarray, y: np.ndarray, split: int = 512) -> mom.Moments:
    """Streamed moments of samples (n, R) and targets (n, M)."""
    m = mom.zeros(x.shape[1], y.shape[1])
    for start in range(0, len(x), split):
        m = mom.update(
            m,
            np.asarray(x[start : start + split], np.float32),
            np.asarray(y[start : start + split], np.float32),
        )
    return m


def gate_data(seed=0, samples=600, channels=7, taps=4, outputs=5, present=3):
    rng = np.random.default_rng(seed)
    row_channel = np.concatenate([np.tile(np.arange(channels), taps), [-1] * present])
    rng.shuffle(row_channel)
    rows = row_channel.size
    x = np.maximum(rng.normal(0.4, 1, (samples, rows)), 0).astype(np.float32)
    kernel = rng.normal(size=(rows, outputs)).astype(np.float32)
    y = x @ kernel + rng.normal(size=(samples, outputs)).astype(np.float32) + 2
    return x, y, kernel, row_channel, np.abs(rng.normal(size=outputs))


def random_variables(model: Any, x: Any, seed: int = 0) -> Any:
    """Random variables; nothing is compiled to make them."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        value = rng.normal(size=leaf.shape) / np.sqrt(max(leaf.shape[:-1] or (1,)))
        if jax.tree_util.keystr(path).rstrip("].'value").endswith(("scale", "var")):
            value = 0.5 + np.abs(value)
        return jnp.asarray(value, leaf.dtype)

    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    return jax.tree_util.tree_map_with_path(draw, shapes)


def half_plan(graph: Any, seed: int = 0) -> dict[str, np.ndarray]:
    """A plan that removes half of every group."""
    rng = np.random.default_rng(seed)
    return {
        group.name: np.sort(rng.permutation(group.size)[: max(1, group.size // 2)])
        for group in graph.groups
    }


def tree_shapes(tree: Any) -> Any:
    """The tree with shapes for arrays."""
    return jax.tree.map(lambda leaf: tuple(leaf.shape), tree)

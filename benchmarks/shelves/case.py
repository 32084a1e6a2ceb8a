"""What a shelf holds: a model, random weights and a small input."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.frameworks.flags import call_flags

SEED = 0


class Case(NamedTuple):
    """One model, ready to be traced.

    Attributes:
      model: a Linen module, an NNX object, or a function (params, *inputs).
      variables: its variables; None for an NNX object, which holds them.
      inputs: small example inputs.
      apply, outputs: as `jp.trace` takes them.
      replay_only: every layer of the framework checks its widths (Keras, Haiku), so
        that emission is not tried.
    """

    model: Any
    variables: Any
    inputs: tuple[Any, ...]
    apply: Callable[..., Any] | None = None
    outputs: Any = None
    replay_only: bool = False


Make = Callable[[], Case]


class Shelf(dict[str, Make]):
    """{name: function that makes the case}; a decorator to fill it with."""

    def __call__(self, name: str) -> Callable[[Make], Make]:
        def add(make: Make) -> Make:
            assert name not in self, name
            self[name] = make
            return make

        return add


def draw(tree: Any) -> Any:
    """Random arrays of the tree's shapes, in the ranges of trained ones.

    Nothing keeps an initial value of 0 or 1, by which an error could hide. Integers
    and keys stay as they are (zeros where only their shape is known).
    """

    def one(path: Any, leaf: Any) -> Any:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            abstract = isinstance(leaf, jax.ShapeDtypeStruct)
            return jnp.zeros(leaf.shape, leaf.dtype) if abstract else leaf
        name = trees.path_name(path)
        rng = np.random.default_rng([SEED, zlib.crc32(name.encode())])
        noise = rng.standard_normal(leaf.shape)
        last = name.lower().removesuffix("/value").rpartition("/")[2]
        positive = any(word in last for word in ("var", "scale", "gamma"))
        if positive or "/var_ema/" in name:  # Haiku's statistics
            noise = 0.7 + 0.3 * np.abs(noise)
        elif len(leaf.shape) < 2:
            noise = 0.1 * noise
        else:
            fan = np.prod(leaf.shape) / max(leaf.shape[-1], leaf.shape[0])
            noise = noise / np.sqrt(fan)
        return jnp.asarray(noise, leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def normal(*shape: int) -> jax.Array:
    """A real-valued input."""
    return jax.random.normal(jax.random.key(SEED + 1), shape)


def tokens(*shape: int, vocabulary: int = 32) -> jax.Array:
    """A batch of token numbers; none of them is 0, the usual padding."""
    return jax.random.randint(jax.random.key(SEED + 2), shape, 1, vocabulary)


def linen(
    module: Any,
    *inputs: Any,
    apply: Callable[..., Any] | None = None,
    outputs: Any = None,
    **options: Any,
) -> Case:
    """The case of a Linen module; options are those of its init call."""
    flags = {**call_flags(type(module)), **options}
    names = ("params", "dropout", "sing_vec")
    keys = dict.fromkeys(names, jax.random.key(SEED))
    shapes = jax.eval_shape(lambda *x: module.init(keys, *x, **flags), *inputs)
    return Case(module, draw(shapes), inputs, apply, outputs)

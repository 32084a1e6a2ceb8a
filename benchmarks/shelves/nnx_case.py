"""What a shelf of NNX objects holds."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from .case import Case, draw


def case(make: Any, *inputs: Any, abstract: bool = True, **options: Any) -> Case:
    """The case of an NNX object with random weights; made abstractly if it can be."""

    def model() -> Any:
        return make(nnx.Rngs(0))

    graphdef, state = nnx.split(nnx.eval_shape(model) if abstract else model())
    return Case(nnx.merge(graphdef, _draw_state(state)), None, inputs, **options)


def _draw_state(state: Any) -> Any:
    pure = nnx.to_pure_dict(state)
    nnx.replace_by_pure_dict(state, jax.tree.map(_key, draw(pure)))
    return state


def _key(leaf: Any) -> Any:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.random.key(0)
    return leaf

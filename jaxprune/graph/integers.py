"""Integers that a program computes from its constants alone: indices, mostly.

JAX leaves the arithmetic of indices in the program (a negative one counts from the end),
so that which channels a gather takes is known only once it is done.
"""

# JAX types `aval` as its base class, which has no shape.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

_LARGEST = 1 << 16  # entries; masks of attention need not be known


def constant_integers(value: Any) -> np.ndarray | None:
    """A constant of the program as integers or bools; None if it is something else."""
    if isinstance(value, int):  # a literal
        return np.asarray(value)
    if isinstance(value, jax.core.Tracer) or not hasattr(value, "__array__"):
        return None
    if not _whole(getattr(value, "dtype", None)) or np.size(value) > _LARGEST:
        return None
    return np.asarray(value)


def computed_integers(
    eqn: jex.JaxprEqn, given: Sequence[np.ndarray | None]
) -> np.ndarray | None:
    """The one result of an equation, from the integers among its operands; None if it
    is not known, of another kind or too large."""
    fold = _FOLDS.get(eqn.primitive.name)
    if fold is None or any(array is None for array in given):
        return None
    aval = eqn.outvars[0].aval
    if not _whole(aval.dtype) or aval.size > _LARGEST:
        return None
    if eqn.primitive.name in ("div", "rem") and not np.all(given[1]):
        return None
    return np.asarray(fold(eqn.params, *given), aval.dtype)


def _whole(dtype: Any) -> bool:
    if dtype is None:
        return False
    return jnp.issubdtype(dtype, np.integer) or jnp.issubdtype(dtype, np.bool_)


def _iota(params: Mapping[str, Any]) -> np.ndarray:
    shape, along = params["shape"], params["dimension"]
    column = [-1 if dim == along else 1 for dim in range(len(shape))]
    return np.broadcast_to(np.arange(shape[along]).reshape(column), shape)


def _broadcast(params: Mapping[str, Any], array: np.ndarray) -> np.ndarray:
    shape, places = params["shape"], params["broadcast_dimensions"]
    column = [1] * len(shape)
    for place, size in zip(places, array.shape, strict=True):
        column[place] = size
    return np.broadcast_to(array.reshape(column), shape)


def _select(params: Mapping[str, Any], which: np.ndarray, *cases: np.ndarray):
    return np.choose(which.astype(int), cases)


def _slice(params: Mapping[str, Any], array: np.ndarray) -> np.ndarray:
    strides = params["strides"] or (1,) * array.ndim
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return array[tuple(slice(*bound) for bound in bounds)]


COMPARISONS = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
}


def _plain(ufunc: Callable[..., Any]) -> Callable[..., Any]:
    return lambda params, *arrays: ufunc(*arrays)


_FOLDS: dict[str, Callable[..., Any]] = {
    "iota": _iota,
    "broadcast_in_dim": _broadcast,
    "select_n": _select,
    "slice": _slice,
    "reshape": lambda params, array: array.reshape(params["new_sizes"]),
    "squeeze": lambda params, array: array.squeeze(params["dimensions"]),
    "expand_dims": lambda params, a: np.expand_dims(a, params["dimensions"]),
    "transpose": lambda params, array: array.transpose(params["permutation"]),
    "rev": lambda params, array: np.flip(array, params["dimensions"]),
    "concatenate": lambda params, *arrays: np.concatenate(arrays, params["dimension"]),
    "convert_element_type": lambda params, array: array,
    **{
        name: _plain(ufunc)
        for name, ufunc in {
            "add": np.add,
            "sub": np.subtract,
            "mul": np.multiply,
            "max": np.maximum,
            "min": np.minimum,
            "div": lambda a, b: (a - np.fmod(a, b)) // b,  # both towards zero
            "rem": np.fmod,
            "sign": np.sign,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "not": np.invert,
            **COMPARISONS,
        }.items()
    },
}

"""Slices what mirrors the variables: optimiser states, momentum, an EMA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.errors import GraphError
from jaxprune.graph import ChannelGraph
from jaxprune.records import Plan
from jaxprune.slicing import keep_indices, take

# Fields of optax's factored second moments (Adafactor): means over one axis.
_ROWS, _COLUMNS, _WHOLE = "v_row", "v_col", "v"


def shrink_like(
    graph: ChannelGraph,
    plan: Plan | Mapping[str, Any],
    tree: Any,
    *,
    like: Any = None,
) -> Any:
    """A tree that mirrors the variables (momentum, Adam moments, an EMA), sliced.

    A leaf mirrors a variable if its path ends with the variable's path (with or
    without its collection; the state of an nnx.Optimizer counts too) and the shapes
    are equal; other leaves are kept. Factored moments (`v_row`, `v_col`) are factored
    anew, so that their product is what it was where channels are left.

    Args:
      graph: the graph the plan was made for.
      plan: `slim.plan`, what was done.
      tree: any pytree: the state of any optax optimizer, a second copy of params.
      like: the shapes to arrive at, such as `optimizer.init(slim.variables["params"])`
        or its `jax.eval_shape`. Needed for Adafactor where it factors large arrays alone:
        those that are not large any more get their moments whole.

    Raises:
      GraphError: a leaf does not have the shape that `like` asks for.
    """
    keep, traced = keep_indices(graph, plan), trees.flatten(graph.variables)
    names = {graph.handle.mirror_name(path): path for path in traced}
    names.update({path: path for path in traced})
    leaves, result = trees.flatten(tree), {}
    targets = trees.flatten(like) if like is not None else {}
    for path, leaf in leaves.items():
        variable = _variable(path, names)
        shape = _shape_of(leaf)
        if variable is None:
            result[path] = leaf
            continue
        full, kept = tuple(traced[variable].shape), keep.get(variable, {})
        lost = _factored_axis(path, shape, full)
        if shape == full:
            leaf = take(leaf, kept)
        elif lost is not None:
            leaf = _factored(path, leaves, full, kept, lost) if kept else leaf
        result[path] = leaf
    for path, target in targets.items():
        shape, found = np.shape(target), _shape_of(result.get(path))
        if found != shape:
            variable = _variable(path, names)
            full = traced[variable].shape if variable else ()
            dense = _dense(path, leaves, full, keep.get(variable or "", {}))
            result[path] = _refactor(path, dense, shape, found)
    return trees.unflatten_like(tree, result)


def _variable(path: str, names: Mapping[str, str]) -> str | None:
    """The variable whose name ends the path."""
    name = path.removesuffix("/value")  # how JAX names what an nnx.Variable holds
    while name and name not in names:
        name = name.partition("/")[2]
    return names.get(name)


def _shape_of(leaf: Any) -> tuple[int, ...]:
    return tuple(getattr(leaf, "shape", ()))


def _field(path: str) -> str | None:
    """The factored field that a leaf belongs to: the first such part of its path."""
    fields = (_ROWS, _COLUMNS, _WHOLE)
    return next((part for part in path.split("/") if part in fields), None)


def _missing_axis(path: str, shape: Sequence[int]) -> int:
    """The axis that the factored moment of such an array lacks: optax drops the largest
    for the rows, the second largest for the columns."""
    return int(np.argsort(shape)[-1 if _field(path) == _ROWS else -2])


def _factored_axis(path: str, shape: tuple[int, ...], full: tuple[int, ...]):
    """The axis that a leaf lacks if it is a factored moment; None if it is not."""
    if len(full) < 2 or _field(path) not in (_ROWS, _COLUMNS):
        return None
    axis = _missing_axis(path, full)
    return axis if shape == tuple(np.delete(full, axis)) else None


def _factored(
    path: str,
    leaves: Mapping[str, Any],
    full: tuple[int, ...],
    kept: Mapping[int, np.ndarray],
    lost: int,
) -> Any:
    """A factored moment of what is left: rows times columns is what it was there.

    Which axis it lacks follows the sizes: another may be the largest now.
    """
    now = [len(kept[a]) if a in kept else n for a, n in enumerate(full)]
    missing = _missing_axis(path, now)
    if isinstance(leaves[path], jax.ShapeDtypeStruct):
        shape = tuple(np.delete(now, missing))
        return jax.ShapeDtypeStruct(shape, leaves[path].dtype)
    dense = _dense(path, leaves, full, kept)
    if dense is None:  # its other factor is not in the tree
        left = [axis for axis in range(len(full)) if axis != lost]
        axes = {left.index(axis): kept[axis] for axis in kept if axis != lost}
        return take(leaves[path], axes)
    return dense.mean(missing)


def _dense(
    path: str,
    leaves: Mapping[str, Any],
    full: tuple[int, ...],
    kept: Mapping[int, np.ndarray],
) -> jax.Array | None:
    """The second moments that are left as one array: rows times columns over the mean
    of all rows, as optax multiplies them."""
    field = _field(path)
    if field is None or len(full) < 2:
        return None
    names = [path.replace(f"{field}/", f"{other}/", 1) for other in (_ROWS, _COLUMNS)]
    order = np.argsort(full)
    first, second = int(order[-1]), int(order[-2])
    found = [_shape_of(leaves.get(name)) for name in names]
    if found != [tuple(np.delete(full, gone)) for gone in (first, second)]:
        return None
    mean = leaves[names[0]].mean(second - (second > first), keepdims=True)
    lefts = [[a for a in range(len(full)) if a != gone] for gone in (first, second)]
    rows, columns = (
        take(leaves[name], {left.index(a): kept[a] for a in kept if a in left})
        for name, left in zip(names, lefts, strict=True)
    )
    rows, columns = jnp.expand_dims(rows, first), jnp.expand_dims(columns, second)
    return rows * columns / jnp.maximum(jnp.expand_dims(mean, first), 1e-30)


def _refactor(
    path: str, dense: jax.Array | None, shape: tuple[int, ...], found: tuple[int, ...]
) -> jax.Array:
    if dense is not None and _field(path) == _WHOLE and shape == dense.shape:
        return dense
    if dense is not None and shape == (1,):
        return jnp.zeros(shape, dense.dtype)
    if dense is not None:
        axis = _missing_axis(path, dense.shape)
        if shape == tuple(np.delete(dense.shape, axis)):
            return dense.mean(axis)
    raise GraphError(
        f"{path}: expected shape {shape} as in `like`, found {found}; pass the plan of "
        "the slim model (`slim.plan`) and a state of the same optimizer for it"
    )

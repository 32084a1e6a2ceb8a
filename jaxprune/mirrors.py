"""Slices what mirrors the variables: optimiser states, momentum, an EMA."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.check import align
from jaxprune.errors import EmissionError, GraphError
from jaxprune.graph import ChannelGraph
from jaxprune.records import Plan
from jaxprune.rescale import Factor, multiplier, scaled
from jaxprune.slicing import keep_indices, take

# Fields of optax's factored second moments (Adafactor): means over one axis.
_ROWS, _COLUMNS, _WHOLE = "v_row", "v_col", "v"
# Which power of the gradient a field of an optimiser's state holds; others are copies
# of the variables. Where a weight is c times what it was, its gradient is 1/c.
_GRADIENTS: dict[str, int] = {
    **dict.fromkeys(("mu", "m", "trace", "exp_avg", "acc_grads"), 1),
    **dict.fromkeys(("nu", "nu_max", "exp_avg_sq", "sum_of_squares"), 2),
    **dict.fromkeys((_ROWS, _COLUMNS, _WHOLE), 2),
}


@dataclass(frozen=True, eq=False)
class _Mirrored:
    """The variable that a leaf mirrors.

    Attributes:
      shape: of the variable, at full size.
      kept: {axis: indices} of what it keeps.
      factors: what `shrink` multiplied it with.
      power: of them, for this leaf: 1 for a copy, -1 for a gradient.
    """

    shape: tuple[int, ...]
    kept: Mapping[int, np.ndarray]
    factors: Sequence[Factor]
    power: int

    def scaled(self, leaf: Any) -> Any:
        """A leaf of the sliced shape, times the factors; a gradient takes no offset."""
        if not self.factors or isinstance(leaf, jax.ShapeDtypeStruct):
            return leaf
        by, plus = multiplier(self.factors, self.kept, len(self.shape))
        return scaled(leaf, by**self.power, plus if self.power == 1 else 0.0)


def shrink_like(
    graph: ChannelGraph,
    plan: Plan | Mapping[str, Any],
    tree: Any,
    *,
    like: Any = None,
    replay: bool | None = None,
) -> Any:
    """A tree that mirrors the variables (momentum, Adam moments, an EMA), sliced.

    A leaf mirrors a variable if its path ends with the variable's path (with or
    without its collection; the state of an nnx.Optimizer counts too) and the shapes
    are equal; other leaves are kept. Factored moments (`v_row`, `v_col`) are factored
    anew, so that their product is what it was where channels are left. What `shrink`
    multiplied kernels with, for constants that follow a size
    (`slim.report["rescaled"]`), copies of the variables are multiplied with too; moments
    of gradients, known by the names of optax's fields, are divided by it or its square.

    Args:
      graph: the graph the plan was made for.
      plan: `slim.plan`, what was done.
      tree: any pytree: the state of any optax optimizer, a second copy of params.
      like: the shapes to arrive at, such as `optimizer.init(slim.variables["params"])`
        or its `jax.eval_shape`. Needed for Adafactor where it factors large arrays alone:
        those that are not large any more get their moments whole.
      replay: as it was for `shrink`; a replay multiplies nothing.

    Raises:
      GraphError: a leaf does not have the shape that `like` asks for.
    """
    leaves, result = trees.flatten(tree), {}
    replay = graph.replay if replay is None else replay
    find = _finder(graph, plan, list(leaves), replay)
    targets = trees.flatten(like) if like is not None else {}
    for path, leaf in leaves.items():
        found = find(path)
        if found is not None and _shape_of(leaf) == found.shape:
            leaf = found.scaled(take(leaf, found.kept))
        elif found is not None and (found.kept or found.factors):
            leaf = _factored(path, leaves, found)
        result[path] = leaf
    for path, target in targets.items():
        shape, have = np.shape(target), _shape_of(result.get(path))
        if have != shape:
            found = find(path)
            dense = None if found is None else _dense(path, leaves, found)
            result[path] = _refactor(path, dense, shape, have)
    return trees.unflatten_like(tree, result)


def _finder(
    graph: ChannelGraph,
    plan: Plan | Mapping[str, Any],
    paths: Sequence[str],
    replay: bool,
):
    """A function path of a leaf -> the variable that it mirrors, or None.

    A path may end with the names of several variables (Adam's "mu/bias" of a bias at the
    top, or of a layer "mu"): the part in front with most leaves behind it tells.
    """
    keep, traced = keep_indices(graph, plan), trees.flatten(graph.variables)
    factors = {} if replay or not keep else _factors(graph, plan)
    # Where two collections have the name, an optimiser means the parameters.
    ranked = sorted(traced, key=graph.handle.is_parameter)
    names = {graph.handle.mirror_name(path): path for path in ranked}
    names.update({path: path for path in traced})

    def readings(path: str) -> list[tuple[str, str]]:
        """(what stands in front, variable), longest names first."""
        parts = path.removesuffix("/value").split("/")  # how nnx.Variables are named
        split = [
            ("/".join(parts[:start]), names.get("/".join(parts[start:])))
            for start in range(len(parts))
        ]
        return [(front, name) for front, name in split if name is not None]

    votes = collections.Counter(front for p in paths for front, _ in readings(p))

    def find(path: str) -> _Mirrored | None:
        found = readings(path)
        if not found:
            return None
        front, variable = max(found, key=lambda reading: votes[reading[0]])
        powers = [-_GRADIENTS[p] for p in front.split("/") if p in _GRADIENTS]
        shape = tuple(traced[variable].shape)
        own = keep.get(variable, {}), factors.get(variable, ())
        return _Mirrored(shape, *own, next(iter(powers), 1))

    return find


def _factors(graph: ChannelGraph, plan: Plan | Mapping[str, Any]):
    try:
        return align(graph, plan).folded.of_leaves
    except EmissionError:  # the plan of a replay
        return {}


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


def _factored(path: str, leaves: Mapping[str, Any], of: _Mirrored) -> Any:
    """A factored moment of what is left: rows times columns is what it was there.

    Which axis it lacks follows the sizes: another may be the largest now. Other leaves
    are returned as they are.
    """
    leaf, full = leaves[path], of.shape
    if len(full) < 2 or _field(path) not in (_ROWS, _COLUMNS):
        return leaf
    lost = _missing_axis(path, full)
    if _shape_of(leaf) != tuple(np.delete(full, lost)):
        return leaf
    now = [len(of.kept[a]) if a in of.kept else n for a, n in enumerate(full)]
    missing = _missing_axis(path, now)
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(tuple(np.delete(now, missing)), leaf.dtype)
    dense = _dense(path, leaves, of)
    return leaf if dense is None else dense.mean(missing)


def _dense(path: str, leaves: Mapping[str, Any], of: _Mirrored) -> jax.Array | None:
    """The second moments that are left as one array: rows times columns over the mean
    of all rows, as optax multiplies them. None without both of them."""
    field, full = _field(path), of.shape
    if field is None or len(full) < 2:
        return None
    names = [path.replace(f"{field}/", f"{other}/", 1) for other in (_ROWS, _COLUMNS)]
    first, second = (_missing_axis(name, full) for name in names)
    have = [_shape_of(leaves.get(name)) for name in names]
    if have != [tuple(np.delete(full, gone)) for gone in (first, second)]:
        return None
    mean = leaves[names[0]].mean(second - (second > first), keepdims=True)
    lefts = [[a for a in range(len(full)) if a != gone] for gone in (first, second)]
    rows, columns = (
        take(leaves[name], {left.index(a): of.kept[a] for a in of.kept if a in left})
        for name, left in zip(names, lefts, strict=True)
    )
    rows, columns = jnp.expand_dims(rows, first), jnp.expand_dims(columns, second)
    return of.scaled(rows * columns / jnp.maximum(jnp.expand_dims(mean, first), 1e-30))


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

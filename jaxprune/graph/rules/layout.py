"""Primitives that only move indices around: reshape, transpose, concatenate, slice."""

# JAX types `aval` as its base class, which has no shape.
# pyright: reportAttributeAccessIssue=false

import math
from collections.abc import Sequence

import numpy as np
from jax.extend import core as jex

from jaxprune.graph.atoms import Axis
from jaxprune.graph.interpret import Value, Walk, is_empty


def reshape(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Merges and splits the smallest blocks of axes whose sizes multiply alike."""
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    axes = values[0].axes
    order = eqn.params.get("dimensions")
    if order is not None:  # transposed first (a convolution under vmap)
        axes, old = tuple(axes[d] for d in order), tuple(old[d] for d in order)
    return [_reshape(walk, axes, old, new)]


def _reshape(
    walk: Walk, axes: Sequence[Axis], old: Sequence[int], new: Sequence[int]
) -> tuple[Axis, ...]:
    if 0 in old or 0 in new:
        return (None,) * len(new)
    result: list[Axis] = []
    i = j = 0
    while i < len(old) or j < len(new):
        first, start = i, j
        a = old[i] if i < len(old) else 1
        b = new[j] if j < len(new) else 1
        i, j = min(i + 1, len(old)), min(j + 1, len(new))
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        block = list(zip(axes[first:i], old[first:i], strict=True))
        real = [pair for pair in block if pair[1] != 1]
        sizes = new[start:j]
        if len(real) == 1 and sum(size != 1 for size in sizes) == 1:
            result += [None if size == 1 else real[0][0] for size in sizes]
        else:
            result += walk.atoms.split(walk.atoms.merge(block), sizes)
    return tuple(result)


def transpose(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    del walk
    return [tuple(values[0].axes[d] for d in eqn.params["permutation"])]


def broadcast_in_dim(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """New axes are uniform: they adopt the channels of what they meet."""
    target = dict(enumerate(eqn.params["broadcast_dimensions"]))
    source = {out: inner for inner, out in target.items()}
    old = eqn.invars[0].aval.shape
    axes = []
    for dim, size in enumerate(eqn.outvars[0].aval.shape):
        if dim in source and old[source[dim]] == size:
            axes.append(values[0].axes[source[dim]])
        else:
            axes.append(walk.fresh(size))
    return [tuple(axes)]


def squeeze(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    del walk
    gone = {int(d) for d in eqn.params["dimensions"]}
    return [tuple(a for d, a in enumerate(values[0].axes) if d not in gone)]


def expand_dims(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    del walk
    new = {int(d) for d in eqn.params["dimensions"]}
    old = iter(values[0].axes)
    rank = len(eqn.outvars[0].aval.shape)
    return [tuple(None if d in new else next(old) for d in range(rank))]


def reverse(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    del walk
    turned = set(eqn.params["dimensions"])
    return [
        tuple(
            axis[::-1] if d in turned and axis is not None else axis
            for d, axis in enumerate(values[0].axes)
        )
    ]


def concatenate(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Index vectors follow one another; an untracked part freezes only itself."""
    along = eqn.params["dimension"]
    axes: list[Axis] = []
    for dim in range(len(values[0].axes)):
        parts = [value.axes[dim] for value in values]
        sizes = [var.aval.shape[dim] for var in eqn.invars]
        if dim == along:
            axes.append(join(walk, parts, sizes))
            continue
        why = f"concatenated at {walk.where} beside an array without"
        parts = [
            part
            for part, var in zip(parts, eqn.invars, strict=True)
            if not is_empty(var)
        ]
        axis = parts[0] if parts else None
        for other in parts[1:]:
            axis = walk.atoms.unite(axis, other, why)
        axes.append(axis)
    return [tuple(axes)]


def join(walk: Walk, parts: Sequence[Axis], sizes: Sequence[int]) -> Axis:
    """One axis of several, end to end; None if none of them is tracked.

    A part of size 1 is not tracked and so is pinned, as any untracked part.
    """
    if all(part is None for part in parts):
        return None
    whole = []
    for part, size in zip(parts, sizes, strict=True):
        if part is None:
            part = walk.atoms.fresh(size)
            walk.atoms.freeze(part, f"joined at {walk.where} from an untracked array")
        whole.append(part)
    return np.concatenate(whole)


def stack(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """A new axis of positions; the axes of the parts are tied."""
    along = int(eqn.params.get("axis", eqn.params.get("dimension", 0)))
    axes = list(values[0].axes)
    for dim in range(len(axes)):
        for value in values[1:]:
            why = f"stacked at {walk.where} on an array without channels"
            axes[dim] = walk.atoms.unite(axes[dim], value.axes[dim], why)
    axes.insert(along % (len(axes) + 1), None)
    return [tuple(axes)]


def pad(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Padded indices are pinned, the others pass; negative pads are slices."""
    axes: list[Axis] = []
    old = eqn.invars[0].aval.shape
    for dim, (low, high, inner) in enumerate(eqn.params["padding_config"]):
        axis = values[0].axes[dim]
        if (low, high, inner) == (0, 0, 0):
            axes.append(axis)
        elif axis is None or low < 0 or high < 0 or inner:
            walk.atoms.freeze(axis, f"padded or cropped at {walk.where}")
            axes.append(None)
        else:
            parts, sizes = [None, axis, None], [low, old[dim], high]
            used = [k for k in range(3) if sizes[k]]
            axes.append(join(walk, [parts[k] for k in used], [sizes[k] for k in used]))
    return [tuple(axes)]


def slices(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    old = eqn.invars[0].aval.shape
    strides = eqn.params["strides"] or (1,) * len(old)
    bounds = zip(
        eqn.params["start_indices"], eqn.params["limit_indices"], strides, strict=True
    )
    return [
        tuple(
            cut(walk, values[0], dim, old[dim], *bound)
            for dim, bound in enumerate(bounds)
        )
    ]


def cut(
    walk: Walk, value: Value, dim: int, size: int, start: int, stop: int, stride: int
) -> Axis:
    """Part of an axis: equal parts are tied position by position, others freeze.

    The source cuts at a share of the axis (halves of a GLU, thirds of a fused qkv),
    and that share falls in the right place only if all parts shrink alike. So do every
    second, third ... index (the pairs of a rotary embedding). A replay cuts where the
    kept channels are, so that its parts shrink as they like.
    """
    axis = value.axes[dim]
    if axis is None or (start, stop, stride) == (0, size, 1):
        return axis
    length = stop - start
    if interleaved(size, start, stop, stride):
        for part in axis.reshape(-1, stride).T[1:]:
            walk.atoms.unite(axis[::stride], part, "")
        return axis[start:stop:stride]
    if walk.tables and stride == 1:
        return free_cut(walk, value, dim, start, stop)
    if stride != 1 or length < 2 or size % length or start % length:
        parts = f"sliced [{start}:{stop}:{stride}] at {walk.where}"
        why = f"{parts}, where trace(replay=True) lets it shrink"
        walk.atoms.freeze(axis, why if stride == 1 else parts)
        return None if length < 2 else axis[start:stop:stride]
    parts = axis.reshape(size // length, length)
    for part in parts[1:]:
        walk.atoms.unite(parts[0], part, "")
    return axis[start:stop]


def free_cut(walk: Walk, value: Value, dim: int, start: int, stop: int) -> Axis:
    """A part that shrinks by itself; one index alone is pinned.

    What no cut takes of an array that the variables alone make (the positions behind
    the input's length, in a table of them) stays: another input may need it.
    """
    axis = value.axes[dim]
    assert axis is not None
    part = axis[start:stop]
    if value.pure:
        walk.taken(axis, part)
    if part.size < 2:
        walk.atoms.freeze(part, f"sliced [{start}:{stop}] at {walk.where}")
        return None
    return part


def interleaved(size: int, start: int, stop: int, stride: int) -> bool:
    """True if the slice takes one index of every `stride` that follow one another."""
    whole = size % stride == 0 and size > stride > start
    return stride > 1 and whole and -((start - stop) // stride) == size // stride


def split(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    sizes, along = eqn.params["sizes"], eqn.params["axis"]
    size = eqn.invars[0].aval.shape[along]
    stops = np.cumsum(sizes)
    results = []
    for start, stop in zip([0, *stops[:-1]], stops, strict=True):
        axes = list(values[0].axes)
        axes[along] = cut(walk, values[0], along, size, int(start), int(stop), 1)
        results.append(tuple(axes))
    return results


def unstack(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Each index of an axis by itself: as many slices of one, without that axis."""
    along, axes = eqn.params["axis"], values[0].axes
    size = eqn.invars[0].aval.shape[along]
    for index in range(size):
        cut(walk, values[0], along, size, index, index + 1, 1)
    return [(*axes[:along], *axes[along + 1 :])] * size


def same(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Every operand as it is."""
    del walk, eqn
    return [value.axes for value in values]


def tile(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Repeats of an axis: a product of a new uniform axis and the old one."""
    old = eqn.invars[0].aval.shape
    axes: list[Axis] = []
    for axis, size, reps in zip(values[0].axes, old, eqn.params["reps"], strict=True):
        if reps == 1:
            axes.append(axis)
        else:
            pair = [(walk.fresh(reps), reps), (axis, size)]
            axes.append(walk.atoms.merge(pair))
    return [tuple(axes)]


def iota(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Positions along one axis; the others are uniform."""
    del values
    along, shape = eqn.params["dimension"], eqn.params["shape"]
    return [
        tuple(
            walk.fresh(size) if d != along or walk.tables else None
            for d, size in enumerate(shape)
        )
    ]


def empty(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    del values
    shape = eqn.outvars[0].aval.shape
    return [tuple(walk.fresh(size) for size in shape) if math.prod(shape) else ()]


RULES = {
    "reshape": reshape,
    "transpose": transpose,
    "broadcast_in_dim": broadcast_in_dim,
    "squeeze": squeeze,
    "expand_dims": expand_dims,
    "rev": reverse,
    "concatenate": concatenate,
    "stack": stack,
    "pad": pad,
    "slice": slices,
    "split": split,
    "unstack": unstack,
    "device_put": same,
    "tile": tile,
    "iota": iota,
    "empty": empty,
    "empty2": empty,
}

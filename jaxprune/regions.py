"""Parts of arrays, and where a part of a result comes from in its operands."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.extend import core as jex

# Part of an array: an axis counted from the right, and bool (n,) on it; None for all.
Region = tuple[int, np.ndarray] | None
# What has no counterpart in an operand.
NOWHERE: Region = (-1, np.zeros(0, bool))
_REDUCTIONS = ("reduce_sum", "reduce_max", "reduce_min")


def mark(region: Region) -> Any:
    """A hashable form of the region."""
    return None if region is None else (region[0], region[1].tobytes())


def overlap(a: Region, b: Region) -> bool:
    if a is None or b is None or a[0] != b[0]:
        return True
    return bool((a[1] & b[1]).any())


def reaches(shape: tuple[int, ...], region: tuple[int, np.ndarray]) -> bool:
    """True if an operand has the region's axis at full length."""
    axis, mask = region
    return len(shape) >= -axis and shape[axis] == mask.size


def is_zero(atom: Any) -> bool:
    return isinstance(atom, jex.Literal) and not np.any(atom.val)


NOWHERE = (-1, np.zeros(0, bool))


def dot_region(eqn, shapes, rank: int, place: int, region: Region) -> Region:
    """The region of one operand that the region of a product comes from."""
    if region is None:
        return None
    contract, batch = eqn.params["dimension_numbers"]
    used = [{*contract[s], *batch[s]} for s in (0, 1)]
    free = [[d for d in range(len(shapes[s])) if d not in used[s]] for s in (0, 1)]
    dim = rank + region[0] - len(batch[0])
    if dim < 0:
        own = batch[place][dim + len(batch[0])]
    elif place == 0 and dim < len(free[0]):
        own = free[0][dim]
    elif place == 1 and dim >= len(free[0]):
        own = free[1][dim - len(free[0])]
    else:
        return NOWHERE
    return own - len(shapes[place]), region[1]


def conv_regions(eqn, rank: int, region: Region) -> list[Region]:
    """The regions of input and kernel that the region of a convolution comes from."""
    if region is None:
        return [None, None]
    numbers = eqn.params["dimension_numbers"]
    if rank + region[0] != numbers.out_spec[1]:
        return [NOWHERE, NOWHERE]
    return [NOWHERE, (numbers.rhs_spec[0] - rank, region[1])]


def moved(eqn, result: int, old: Any, new: Any, region: Region) -> Region:
    """The region of the operand of a layout primitive, or False."""
    name, params, rank = eqn.primitive.name, eqn.params, len(old)
    if name in ("slice", "split"):
        if name == "slice":
            if params["strides"] and any(s != 1 for s in params["strides"]):
                return NOWHERE
            starts = params["start_indices"]
        else:
            starts = [0] * rank
            starts[params["axis"]] = sum(params["sizes"][:result])
        cut = [d for d in range(rank) if old[d] != new[d]]
        if region is not None:
            cut = sorted({*cut, rank + region[0]})
        if len(cut) > 1:
            return NOWHERE
        if not cut:
            return region
        mask = np.zeros(old[cut[0]], bool)
        inside = slice(starts[cut[0]], starts[cut[0]] + new[cut[0]])
        mask[inside] = True if region is None else region[1]
        return cut[0] - rank, mask
    if name == "unstack":
        along = params["axis"]
        mask = np.arange(old[along]) == result
        return (along - rank, mask) if region is None else NOWHERE
    if name not in (
        "reshape",
        "transpose",
        "squeeze",
        "expand_dims",
        "broadcast_in_dim",
        *_REDUCTIONS,
    ):
        return NOWHERE
    if region is None:
        return None
    if name == "reshape" and params.get("dimensions") is not None:
        return NOWHERE  # it transposes first
    dim, mask = len(new) + region[0], region[1]
    if name == "transpose":
        return params["permutation"][dim] - rank, mask
    if name == "broadcast_in_dim":
        target = list(params["broadcast_dimensions"])
        if dim not in target or old[target.index(dim)] != mask.size:
            return NOWHERE
        return target.index(dim) - rank, mask
    if name in _REDUCTIONS:
        left = [d for d in range(rank) if d not in params["axes"]]
        return left[dim] - rank, mask
    return _reshaped(old, new, dim, mask)


def _reshaped(old: Any, new: Any, dim: int, mask: np.ndarray) -> Region:
    """Only the axes around the region change places with others: batch axes may not."""
    shape = [1] * len(new)
    shape[dim] = mask.size
    lead = 0
    while lead < min(len(old), dim) and old[lead] == new[lead]:
        lead += 1
    whole = np.broadcast_to(mask.reshape(shape[lead:]), new[lead:])
    inner = whole.reshape(old[lead:])
    for axis in range(inner.ndim):
        rest = tuple(d for d in range(inner.ndim) if d != axis)
        if (inner.all(rest) == inner.any(rest)).all():
            return axis - inner.ndim, np.asarray(inner.any(rest))
    return NOWHERE

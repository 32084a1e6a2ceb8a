"""Gathers, scatters and dynamic slices: full axes pass, indexed ones freeze."""

# JAX types `aval` as its base class, which has no shape.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Sequence
from typing import Any

from jax.extend import core as jex

from jaxprune.graph.atoms import Axis
from jaxprune.graph.interpret import Value, Walk


def gather(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Axes taken whole (the features of an embedding) pass on to the result, and those
    that operand and indices share (take_along_axis).

    An axis is whole too where a start is given for it (dynamic slices under vmap): any
    but 0 is moved there or drops the slice, of all channels alike.
    """
    operand, indices = values
    found = _taken(walk, eqn, operand, indices)
    if found is not None:
        return [found]
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape, rank = eqn.invars[0].aval.shape, len(eqn.outvars[0].aval.shape)
    shared = _shared(numbers, "start_indices_batching_dims")
    offset = tuple(numbers.offset_dims)
    gone = {*numbers.collapsed_slice_dims, *shared}
    kept = [dim for dim in range(len(shape)) if dim not in gone]
    whole = {d for d in kept if sizes[d] == shape[d]}
    axes: list[Axis] = [None] * rank
    for place, dim in zip(offset, kept, strict=True):
        axes[place] = operand.axes[dim] if dim in whole else None
    _indexed(walk, operand.axes, {*whole, *shared}, indices.axes, {*shared.values()})
    batch = [place for place in range(rank) if place not in offset]
    for dim, of_index in shared.items():
        axes[batch[of_index]] = walk.atoms.unite(
            operand.axes[dim], indices.axes[of_index], f"indexed at {walk.where}"
        )
    return [tuple(axes)]


def _taken(
    walk: Walk, eqn: jex.JaxprEqn, operand: Value, indices: Value
) -> tuple[Axis, ...] | None:
    """Axes of a result whose channels the program picks by numbers of its own (x[:, perm]).

    Only for a replay, which renumbers them. None if it picks otherwise.
    """
    numbers, index = eqn.params["dimension_numbers"], indices.integers
    if not walk.tables or operand.pure or index is None or index.ndim != 2:
        return None
    if len(numbers.start_index_map) != 1 or _shared(
        numbers, "start_indices_batching_dims"
    ):
        return None
    (dim,), picked = numbers.start_index_map, index[:, 0]
    axis, shape = operand.axes[dim], eqn.invars[0].aval.shape
    if axis is None or tuple(numbers.collapsed_slice_dims) != (dim,):
        return None
    rest = [d for d in range(len(shape)) if d != dim]
    whole = all(eqn.params["slice_sizes"][d] == shape[d] for d in rest)
    if not whole or picked.min() < 0 or picked.max() >= shape[dim]:
        return None
    axes = [operand.axes[d] for d in rest]
    (place,) = {*range(len(shape))}.difference(numbers.offset_dims)
    why = f"indexed at {walk.where}"
    axes.insert(place, walk.atoms.unite(axis[picked], indices.axes[0], why))
    return tuple(axes)


def _shared(numbers: Any, name: str) -> dict[int, int]:
    """{axis of the operand: axis of the indices} that are walked along together."""
    own = getattr(numbers, "operand_batching_dims", ())
    return dict(zip(own, getattr(numbers, name, ()), strict=True))


def _indexed(
    walk: Walk,
    operand: Sequence[Axis],
    free: set[int],
    indices: Sequence[Axis],
    shared: set[int],
) -> None:
    """Pins the axes that indices point into, and the indices' own."""
    for dim, axis in enumerate(operand):
        if dim not in free:
            walk.atoms.freeze(axis, f"indexed at {walk.where}")
    rest = [axis for dim, axis in enumerate(indices) if dim not in shared]
    walk.pin(rest, f"used as indices at {walk.where}")


def dynamic_slice(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    operand, shape = values[0], eqn.invars[0].aval.shape
    axes: list[Axis] = []
    for dim, size in enumerate(eqn.params["slice_sizes"]):
        if size == shape[dim]:
            axes.append(operand.axes[dim])
        else:
            walk.atoms.freeze(operand.axes[dim], f"dynamic slice at {walk.where}")
            axes.append(None)
    return [tuple(axes)]


def dynamic_update_slice(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    operand, update = values[0], values[1]
    shapes = [var.aval.shape for var in eqn.invars[:2]]
    axes: list[Axis] = []
    for dim, (size, part) in enumerate(zip(*shapes, strict=True)):
        why = f"updated at {walk.where}"
        if size == part:
            axes.append(walk.atoms.unite(operand.axes[dim], update.axes[dim], why))
        else:
            walk.pin([operand.axes[dim], update.axes[dim]], why)
            axes.append(None)
    return [tuple(axes)]


def scatter(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Window axes of full size are tied to the operand's, and those that operand,
    indices and updates share to each other; the others freeze."""
    operand, indices, updates = values
    numbers = eqn.params["dimension_numbers"]
    shared = _shared(numbers, "scatter_indices_batching_dims")
    gone = {*numbers.inserted_window_dims, *shared}
    kept = [dim for dim in range(len(operand.axes)) if dim not in gone]
    shape, given = (eqn.invars[k].aval.shape for k in (0, 2))
    why = f"scattered into at {walk.where}"
    window = dict(zip(numbers.update_window_dims, kept, strict=True))
    batch = [place for place in range(len(given)) if place not in window]
    tied = {place: d for place, d in window.items() if given[place] == shape[d]}
    tied.update({batch[of_index]: dim for dim, of_index in shared.items()})
    axes: list[Axis] = [None] * len(shape)
    for place, axis in enumerate(updates.axes):
        dim = tied.get(place)
        if dim is None:
            walk.atoms.freeze(axis, why)
            continue
        axes[dim] = walk.atoms.unite(operand.axes[dim], axis, why)
        if dim in shared:
            along = indices.axes[shared[dim]]
            axes[dim] = walk.atoms.unite(axes[dim], along, why)
    _indexed(walk, operand.axes, set(tied.values()), indices.axes, {*shared.values()})
    return [tuple(axes)]


# JAX writes some of them with a hyphen, which differ by version.
_SCATTERS = """
scatter scatter_add scatter-add scatter_sub scatter-sub scatter_mul scatter-mul
scatter_min scatter-min scatter_max scatter-max
""".split()

RULES = {
    "gather": gather,
    "dynamic_slice": dynamic_slice,
    "dynamic_update_slice": dynamic_update_slice,
    **dict.fromkeys(_SCATTERS, scatter),
}

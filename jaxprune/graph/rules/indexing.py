"""Gathers, scatters and dynamic slices: full axes pass, indexed ones freeze."""

# JAX types `aval` as its base class, which has no shape.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Sequence

from jax.extend import core as jex

from jaxprune.graph.atoms import Axis
from jaxprune.graph.interpret import Value, Walk


def gather(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Axes taken whole (the features of an embedding) pass on to the result."""
    operand, indices = values
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    shape = eqn.invars[0].aval.shape
    offset = tuple(numbers.offset_dims)
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    gone = {*numbers.collapsed_slice_dims, *batching}
    kept = [dim for dim in range(len(shape)) if dim not in gone]
    why = f"indexed at {walk.where}"
    whole = {
        d for d in kept if sizes[d] == shape[d] and d not in numbers.start_index_map
    }
    for dim, axis in enumerate(operand.axes):
        if dim not in whole:
            walk.atoms.freeze(axis, why)
    walk.pin(indices.axes, f"used as indices at {walk.where}")
    axes: list[Axis] = [None] * len(eqn.outvars[0].aval.shape)
    for place, dim in zip(offset, kept, strict=True):
        axes[place] = operand.axes[dim] if dim in whole else None
    return [tuple(axes)]


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
    """Window axes of full size are tied to the operand's; the others freeze."""
    operand, indices, updates = values
    numbers = eqn.params["dimension_numbers"]
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    gone = {*numbers.inserted_window_dims, *batching}
    kept = [dim for dim in range(len(operand.axes)) if dim not in gone]
    shape, why = eqn.invars[0].aval.shape, f"scattered into at {walk.where}"
    axes: list[Axis] = [None] * len(shape)
    window = dict(zip(numbers.update_window_dims, kept, strict=True))
    for place, axis in enumerate(updates.axes):
        dim = window.get(place)
        full = dim is not None and eqn.invars[2].aval.shape[place] == shape[dim]
        if dim is not None and full and dim not in numbers.scatter_dims_to_operand_dims:
            axes[dim] = walk.atoms.unite(operand.axes[dim], axis, why)
        else:
            walk.atoms.freeze(axis, why)
    for dim, axis in enumerate(operand.axes):
        if axes[dim] is None:
            walk.atoms.freeze(axis, why)
    walk.pin(indices.axes, f"used as indices at {walk.where}")
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

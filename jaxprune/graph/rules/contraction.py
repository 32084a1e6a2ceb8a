"""Contractions: dot_general and conv_general_dilated in all their forms."""

# JAX types `aval` as its base class, which has no shape.
# pyright: reportAttributeAccessIssue=false

from collections.abc import Sequence

from jax.extend import core as jex

from jaxprune.graph.atoms import Axis
from jaxprune.graph.interpret import TABLES, Value, Walk

Pair = tuple[Sequence[int], Sequence[int]]
WINDOW = "slides over this axis"


def dot_general(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Contracted and batch pairs are tied; the rest comes out: batch, lhs, rhs."""
    left, right = values
    alone = "with an array that has no channels there"
    if any(value.pure and value.source is None for value in values):
        alone += f" ({TABLES})"
    found = _product(walk, eqn, left, right, alone)
    _attention_widths(walk, eqn, values)
    return found


def _attention_widths(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]) -> None:
    """Ties the width of the values to that of the queries in jax.nn's attention.

    `jax.nn.dot_product_attention` insists that they are equal, a thing that its
    equations do not show; its two contractions are known by their source lines.
    """
    line = _attention_line(eqn)
    if line is None:
        return
    for record in reversed(walk.records.values()):
        if record.name != "dot_general":
            continue
        before = _attention_line(record.eqn)
        if before is None or before >= line:
            return
        (contract, _), _ = record.eqn.params["dimension_numbers"]
        width = record.inputs[0].axes[contract[0]]
        for side, value in enumerate(values):
            contracted, batch = (d[side] for d in eqn.params["dimension_numbers"])
            free = set(range(len(value.axes))) - {*contracted, *batch}
            axes = [value.axes[d] for d in free]
            axis = axes[0] if len(axes) == 1 else None
            if axis is not None and width is not None and axis.size == width.size:
                walk.atoms.unite(width, axis, "")
        return


def _attention_line(eqn: jex.JaxprEqn) -> int | None:
    traceback = getattr(eqn.source_info, "traceback", None)
    for frame in traceback.frames if traceback else ():
        if frame.function_name == "_dot_product_attention_core":
            return frame.line_num
    return None


def convolution(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Input channels are tied to the kernel's, output channels are the kernel's.

    With G feature groups the input splits into (g, i) and the output into (g, o):
    g is tied to g and i to the kernel's input axis, which covers grouped and
    depthwise convolutions and channel multipliers.
    """
    image, kernel = values
    numbers = eqn.params["dimension_numbers"]
    lhs_spec, rhs_spec, out_spec = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    why = f"convolution at {walk.where} {WINDOW}"
    walk.pin([image.axes[d] for d in lhs_spec[2:]], why)
    walk.pin([kernel.axes[d] for d in rhs_spec[2:]], why)
    axes: list[Axis] = [None] * len(out_spec)
    inputs, outputs = image.axes[lhs_spec[1]], kernel.axes[rhs_spec[0]]
    taken = kernel.axes[rhs_spec[1]]
    if eqn.params["batch_group_count"] != 1:
        why = f"batch-grouped convolution at {walk.where}"
        walk.pin([inputs, outputs, taken, image.axes[lhs_spec[0]]], why)
        return [tuple(axes)]
    axes[out_spec[0]] = image.axes[lhs_spec[0]]
    groups = eqn.params["feature_group_count"]
    why = f"convolved at {walk.where} with an array that has no channels there"
    if groups == 1:
        walk.atoms.unite(inputs, taken, why)
    else:
        shape = eqn.invars[0].aval.shape
        features = eqn.invars[1].aval.shape[rhs_spec[0]]
        per_group = shape[lhs_spec[1]] // groups
        of_input, within = walk.atoms.split(inputs, (groups, per_group))
        of_output, _ = walk.atoms.split(outputs, (groups, features // groups))
        walk.atoms.unite(of_input, of_output, why)
        if per_group > 1:
            walk.atoms.unite(within, taken, why)
    axes[out_spec[1]] = outputs
    return [tuple(axes)]


def ragged_dot(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Rows of one group after the other, each group by its own matrix (experts).

    Contracted pairs are tied; rows, groups and their sizes are positions. Forms in
    which the groups cut the contracted or a batch axis freeze what they touch.
    """
    left, right, *sizes = values
    rows = eqn.params["ragged_dot_dimension_numbers"].lhs_ragged_dimensions
    contract, batch, groups = product_dims(eqn)
    why = f"grouped by rows at {walk.where}"
    if not groups or {*rows} & {*contract[0], *batch[0]}:
        for value in values:
            walk.pin(value.axes, why)
        return [(None,) * len(eqn.outvars[0].aval.shape)]
    for value in sizes:
        walk.pin(value.axes, why)
    walk.pin([left.axes[d] for d in rows], why)
    walk.pin([right.axes[d] for d in groups], why)
    return _product(walk, eqn, left, right, "with an array that has no channels there")


def product_dims(eqn: jex.JaxprEqn) -> tuple[Pair, Pair, tuple[int, ...]]:
    """Contracted and batch axes of (left, right), and the axes of the right operand
    that number the matrices of a ragged product."""
    if eqn.primitive.name == "dot_general":
        return *eqn.params["dimension_numbers"], ()
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    return *numbers.dot_dimension_numbers, tuple(numbers.rhs_group_dimensions)


def _product(
    walk: Walk, eqn: jex.JaxprEqn, left: Value, right: Value, alone: str
) -> list[tuple[Axis, ...]]:
    contract, batch, groups = product_dims(eqn)
    why = f"contracted at {walk.where} {alone}"
    for a, b in zip(*contract, strict=True):
        walk.atoms.unite(left.axes[a], right.axes[b], why)
    why = f"batched at {walk.where} {alone}"
    lead = [
        walk.atoms.unite(left.axes[a], right.axes[b], why)
        for a, b in zip(*batch, strict=True)
    ]
    used_l, used_r = {*contract[0], *batch[0]}, {*contract[1], *batch[1], *groups}
    free_l = [axis for d, axis in enumerate(left.axes) if d not in used_l]
    free_r = [axis for d, axis in enumerate(right.axes) if d not in used_r]
    return [(*lead, *free_l, *free_r)]


def matrices(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """Decompositions and solutions of the matrices in the last two axes.

    The axes before pass; those of the matrices are pinned, and so is all that an
    operand or result of fewer leading axes has.
    """
    why = f"{eqn.primitive.name} at {walk.where} takes this axis for one of a matrix"
    lead = len(values[0].axes) - 2
    for value in values:
        walk.pin(value.axes[lead:], why)
    axes = list(values[0].axes[:lead])
    for value in values[1:]:
        for dim, axis in enumerate(value.axes[:lead]):
            axes[dim] = walk.atoms.unite(axes[dim], axis, why)
    return [(*axes, *(None,) * (len(var.aval.shape) - lead)) for var in eqn.outvars]


_MATRICES = """
cholesky eig eigh geqrf hessenberg householder_product lu qr schur svd
triangular_solve tridiagonal tridiagonal_solve
""".split()

RULES = {
    "dot_general": dot_general,
    "conv_general_dilated": convolution,
    "ragged_dot_general": ragged_dot,
    **dict.fromkeys(_MATRICES, matrices),
}

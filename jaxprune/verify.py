"""The proof: the slim model against the original with removed channels silenced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxprune.conv import plain_convolutions
from jaxprune.errors import EmissionError
from jaxprune.graph import ChannelGraph, Site, evaluate, tree_arguments
from jaxprune.graph.evaluate import has_loops, sub_jaxprs
from jaxprune.records import Plan
from jaxprune.surgery import shrink, slice_variables, slim_handle

# What a removed entry must be for a reduction over it to pass it by.
_NEUTRAL = {
    "reduce_max": -np.inf,
    "argmax": -np.inf,
    "reduce_min": np.inf,
    "argmin": np.inf,
    "reduce_prod": 1.0,
    "reduce_and": True,
}


def align(graph: ChannelGraph, plan: Plan | Mapping[str, Any]) -> dict[Site, Any]:
    """Literals of the slim program by call site, after the static check of the plan.

    The slim model is traced abstractly and held against the original's records: the
    same primitives in the same order, every shape as predicted, slices that start at
    the kept count before them. Costs no FLOPs.

    Raises:
      EmissionError: the slim program is another one, with the first difference.
    """
    plan = graph.complete(plan)
    structs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), graph.variables
    )
    small = slice_variables(graph, plan, structs)
    handle = slim_handle(graph, plan, small)
    try:
        with plain_convolutions():
            slim = jax.make_jaxpr(lambda v, i: handle(v, *i))(small, graph.inputs)
    except Exception as error:
        raise EmissionError(
            "the slim model cannot be traced, because a size in its source did not "
            f"follow its arrays: {str(error).splitlines()[0]}; keep that group whole"
        ) from error
    literals: dict[Site, Any] = {}
    _align(graph, graph.unit_mask(plan), graph.closed, slim, (), literals)
    return literals


def _align(
    graph: ChannelGraph,
    mask: np.ndarray,
    full: jex.ClosedJaxpr,
    slim: jex.ClosedJaxpr,
    site: Site,
    literals: dict[Site, Any],
) -> None:
    names = [[e.primitive.name for e in c.jaxpr.eqns] for c in (full, slim)]
    if names[0] != names[1]:
        number = next(
            (k for k, (a, b) in enumerate(zip(*names, strict=False)) if a != b),
            min(map(len, names)),
        )
        where = [n[number] if number < len(n) else "nothing" for n in names]
        raise EmissionError(
            "the slim model runs other operations than the original: at equation "
            f"{(*site, number)} expected {where[0]}, found {where[1]}; a branch in its "
            "source depends on a size that changed. Keep that group whole"
        )
    pairs = zip(full.jaxpr.eqns, slim.jaxpr.eqns, strict=True)
    for number, (eqn, other) in enumerate(pairs):
        here = (*site, number)
        record = graph.records[here]
        for value, var, found in zip(
            record.outputs, eqn.outvars, other.outvars, strict=True
        ):
            expected = kept_shape(graph, mask, value.axes, var.aval.shape)
            if expected != tuple(found.aval.shape):
                raise EmissionError(
                    f"a size did not follow at {record.name} {here}: expected shape "
                    f"{expected}, found {tuple(found.aval.shape)}"
                )
        _check_starts(graph, mask, record, other, here)
        literals[here] = [
            atom.val if isinstance(atom, jex.Literal) else None for atom in other.invars
        ]
        inner = list(zip(sub_jaxprs(eqn), sub_jaxprs(other), strict=True))
        for branch, (a, b) in enumerate(inner):
            deeper = (
                here if len(inner) == 1 and record.name != "cond" else (*here, branch)
            )
            _align(graph, mask, a, b, deeper, literals)


def kept_shape(graph: ChannelGraph, mask: np.ndarray, axes, shape) -> tuple[int, ...]:
    """The shape that is left under a channel mask."""
    return tuple(
        size if axis is None else int(axis_mask(graph, mask, axis).sum())
        for axis, size in zip(axes, shape, strict=True)
    )


def axis_mask(graph: ChannelGraph, mask: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """bool array (n,): which indices of a node vector are kept."""
    return np.append(mask, True)[graph.needs(axis)].all(1)


def _check_starts(graph, mask, record, other, here) -> None:
    if record.name != "slice":
        return
    source = record.inputs[0].axes
    starts = record.eqn.params["start_indices"]
    for axis, start, found in zip(
        source, starts, other.params["start_indices"], strict=True
    ):
        kept = start if axis is None else axis_mask(graph, mask, axis)[:start].sum()
        if int(kept) != found:
            raise EmissionError(
                f"a slice did not follow at {here}: expected start {int(kept)}, found "
                f"{found}"
            )


def masked_outputs(
    graph: ChannelGraph,
    plan: Plan | Mapping[str, Any],
    variables: Any,
    inputs: Any,
) -> list[jax.Array]:
    """Flat outputs of the ORIGINAL program with removed channels silenced throughout.

    The original jaxpr runs at full size; after every equation the removed indices of
    its results are set to zero (to the neutral element before a maximum, minimum or
    product). Normalisations run over kept channels only: the size constants in them
    (scalar literals) are read from the aligned slim program.
    """
    plan = graph.complete(plan)
    graph = graph.retrace(inputs)
    mask, literals = graph.unit_mask(plan), align(graph, plan)

    def silence(array: Any, axes: Any, value: Any = 0) -> Any:
        for dim, axis in enumerate(axes):
            if axis is None:
                continue
            kept = axis_mask(graph, mask, axis)
            if not kept.all():
                shape = [1] * array.ndim
                shape[dim] = kept.size
                array = jnp.where(jnp.asarray(kept).reshape(shape), array, value)
        return array

    def before(site: Site, eqn: jex.JaxprEqn, operands: list[Any]) -> list[Any]:
        operands = [
            operand if new is None or not isinstance(atom, jex.Literal) else new
            for operand, new, atom in zip(
                operands, literals[site], eqn.invars, strict=True
            )
        ]
        neutral = _NEUTRAL.get(eqn.primitive.name)
        if neutral is not None:
            axes = graph.records[site].inputs[0].axes
            operands = [silence(operands[0], axes, neutral), *operands[1:]]
        return operands

    def after(site: Site, eqn: Any, operands: Any, results: list[Any]) -> list[Any]:
        del eqn, operands
        values = graph.records[site].outputs
        return [silence(r, v.axes) for r, v in zip(results, values, strict=True)]

    def run(variables: Any, inputs: Any) -> list[Any]:
        arguments = tree_arguments(variables, inputs)
        values = list(graph.leaves.values())
        arguments = [
            silence(a, values[k].axes) if k < len(values) else a
            for k, a in enumerate(arguments)
        ]
        return evaluate(graph.closed, arguments, before=before, after=after, loops=True)

    stepped = has_loops(graph.closed)
    return (run if stepped else jax.jit(run))(variables, inputs)


def verify(
    graph: ChannelGraph,
    plan: Plan | Mapping[str, Any],
    x: Any,
    *,
    variables: Any = None,
    tolerance: float = 1e-4,
) -> float:
    """max |masked original - slim| over the outputs, on the inputs x.

    Args:
      graph: from `trace`, with real arrays (or pass `variables`).
      plan: what is kept.
      x: an input array, or a tuple of the model's inputs, of any batch size.
      variables: full-size arrays to prove the plan with; by default those traced.
      tolerance: largest error allowed, relative to the largest output (at least 1).

    Raises:
      EmissionError: the two differ by more than the tolerance.
    """
    source = graph.variables if variables is None else variables
    inputs = x if isinstance(x, tuple) else (x,)
    expected = masked_outputs(graph, plan, source, inputs)
    slim = shrink(graph, plan, source)
    handle = slim_handle(graph, slim.plan, slim.variables)
    found = jax.tree.leaves(jax.jit(lambda v, i: handle(v, *i))(slim.variables, inputs))
    worst, scale = 0.0, 1.0
    for a, b in zip(expected, found, strict=True):
        difference = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64))
        worst = max(worst, float(difference.max(initial=0.0)))
        scale = max(scale, float(np.abs(np.asarray(a)).max(initial=0.0)))
    if not worst <= tolerance * scale:
        raise EmissionError(
            f"the slim model differs from the masked original by {worst:.3g} where "
            f"outputs reach {scale:.3g}; allowed is {tolerance:g} relative. Please keep "
            "this model and plan: they show a defect"
        )
    return worst

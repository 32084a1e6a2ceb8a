"""The static check of a plan: the slim program is the original's, only smaller.

The slim model is traced abstractly and held against the original's records: the same
primitives in the same order, every shape as predicted, slices that start at the kept
count before them. A width that did not follow, or a branch on a shape that flipped,
is found before anyone runs the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from jaxprune.conv import plain_convolutions
from jaxprune.errors import EmissionError
from jaxprune.graph import ChannelGraph, Site
from jaxprune.graph.evaluate import sub_jaxprs
from jaxprune.records import Plan
from jaxprune.slicing import slice_variables


def slim_handle(graph: ChannelGraph, plan: Plan, small: Any) -> Any:
    """The handle of the smaller model for sliced variables (real or abstract)."""
    settings = graph.handle.settings(graph.notes, graph.place_masks(plan))
    try:
        return graph.handle.rebuild(small, settings)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EmissionError(
            f"{type(graph.handle.model).__name__} could not be rebuilt from the "
            f"sliced arrays: {error}"
        ) from error


def follow(graph: ChannelGraph, plan: Plan) -> tuple[Plan, dict[str, str]]:
    """The plan without the groups that the model cannot follow, and why they stay.

    Bisects over the groups that lose channels, so that the good ones are pruned.
    """
    changed = [n for n, kept in plan.items() if kept.size < plan.sizes[n]]
    reasons: dict[str, str] = {}

    def restricted(names: list[str]) -> Plan:
        return graph.complete({name: plan[name] for name in names})

    def grow(good: list[str], candidates: list[str]) -> list[str]:
        if not candidates:
            return good
        try:
            align(graph, restricted(good + candidates))
        except EmissionError as error:
            if len(candidates) == 1:
                reasons[candidates[0]] = str(error)
                return good
            half = len(candidates) // 2
            return grow(grow(good, candidates[:half]), candidates[half:])
        return good + candidates

    good = grow([], changed)
    return restricted(good), reasons


def align(graph: ChannelGraph, plan: Plan | Mapping[str, Any]) -> dict[Site, Any]:
    """Literals of the slim program by call site, after the static check of the plan.

    Costs no FLOPs.

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

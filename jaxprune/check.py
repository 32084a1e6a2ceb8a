"""The static check of a plan: the slim program is the original's, only smaller.

The slim model is traced abstractly and held against the original's records: the same
primitives in the same order, every shape as predicted, slices that start at the kept
count before them, the same numbers but for those that count the terms of a mean and
those that weights make up for (`jaxprune.rescale`). A width that did not follow, or a
branch on a shape that flipped, is found before anyone runs the model.
"""

# JAX types `aval` as its base class, which has no shape, and `val` as no attribute.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxprune.conv import plain_convolutions
from jaxprune.equations import check_constants, check_operands, check_params
from jaxprune.errors import EmissionError
from jaxprune.graph import ChannelGraph, Site
from jaxprune.graph.evaluate import sub_jaxprs
from jaxprune.graph.interpret import source_line
from jaxprune.graph.means import Divisor, divisor_at, of_a_mean, term_counts
from jaxprune.records import Plan
from jaxprune.rescale import Folded, fold_constants
from jaxprune.slicing import slice_variables


@dataclass(frozen=True, eq=False)
class Aligned:
    """What of the numbers in the slim program differs from the original's.

    Attributes:
      means: literals, by call site, that count terms, at their new values; None for
        each that is the original's.
      folded: what the weights take up for the others.
    """

    means: Mapping[Site, Sequence[Any]] = field(default_factory=dict)
    folded: Folded = field(default_factory=Folded)


def slim_handle(graph: ChannelGraph, plan: Plan, small: Any) -> Any:
    """The handle of the smaller model for sliced variables (real or abstract)."""
    settings = graph.handle.settings(graph.notes, graph.layer_masks(plan))
    try:
        return graph.handle.rebuild(small, settings)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EmissionError(
            f"{type(graph.handle.model).__name__} could not be rebuilt from the "
            f"sliced arrays: {error}"
        ) from error


def follow(
    graph: ChannelGraph,
    plan: Plan,
    check: Callable[[ChannelGraph, Plan], Any] | None = None,
) -> tuple[Plan, dict[str, str]]:
    """The plan without the groups that the model cannot follow, and why they stay.

    Bisects over the groups that lose channels, so that the good ones are pruned.
    `check` raises EmissionError for a plan that cannot be followed; by default it is
    `align`.
    """
    check = check or align
    changed = [n for n, kept in plan.items() if kept.size < plan.sizes[n]]
    reasons: dict[str, str] = {}

    def restricted(names: list[str]) -> Plan:
        return graph.complete({name: plan[name] for name in names})

    def grow(good: list[str], candidates: list[str]) -> list[str]:
        if not candidates:
            return good
        try:
            check(graph, restricted(good + candidates))
        except EmissionError as error:
            if len(candidates) == 1:
                reasons[candidates[0]] = str(error)
                return good
            half = len(candidates) // 2
            return grow(grow(good, candidates[:half]), candidates[half:])
        return good + candidates

    good = grow([], changed)
    return restricted(good), reasons


def align(graph: ChannelGraph, plan: Plan | Mapping[str, Any]) -> Aligned:
    """The static check of the plan, and the numbers in which its program differs.

    Costs no FLOPs.

    Raises:
      EmissionError: the slim program is another one, with the first difference.
    """
    plan = graph.complete(plan)
    mask = graph.unit_mask(plan)
    known = graph.aligned.get(mask.tobytes())
    if known is not None:
        return known
    structs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), graph.variables
    )
    small = slice_variables(graph, plan, structs)
    handle = slim_handle(graph, plan, small)
    try:
        with plain_convolutions():
            slim = jax.make_jaxpr(lambda v, i: handle.trace({}, v, *i))(
                small, graph.inputs
            )
    except Exception as error:
        raise EmissionError(
            "the slim model cannot be traced, because a size in its source did not "
            "follow its arrays, or a comparison of sizes came out otherwise: "
            f"{str(error).splitlines()[0]}; keep that group whole"
        ) from error
    literals: dict[Site, Any] = {}
    _align(graph, mask, graph.closed, slim, (), literals)
    found = _explain(graph, mask, literals)
    graph.aligned.clear()  # the last plan is asked for again, by the proof
    graph.aligned[mask.tobytes()] = found
    return found


def doubtful_divisors(
    graph: ChannelGraph, plan: Plan | Mapping[str, Any]
) -> tuple[frozenset[Divisor], frozenset[Divisor]]:
    """(numbers of the source's own, means): divisions in the user's source by a number
    that is the count of the terms that are summed, perhaps by chance.

    The source at the smaller size tells which number follows. Where it cannot be traced
    at that size, all are taken for means.
    """
    plan = graph.complete(plan)
    counts = _term_counts(graph, graph.unit_mask(plan))
    doubtful = {
        site: divisor_at(graph.records[site], place)
        for site, (place, _) in counts.items()
        if not of_a_mean(graph.records[site])
    }
    if not doubtful:
        return frozenset(), frozenset()
    try:
        means = align(graph, plan).means
    except EmissionError:
        return frozenset(), frozenset(doubtful.values())
    own = frozenset(found for site, found in doubtful.items() if site not in means)
    return own, frozenset()


def means_of_the_source(graph: ChannelGraph, aligned: Aligned) -> frozenset[Divisor]:
    """Divisions in the user's own source that now count the terms that are left."""
    return frozenset(
        divisor_at(graph.records[site], place)
        for site, values in aligned.means.items()
        for place, value in enumerate(values)
        if value is not None
        and site not in graph.wiring.dead
        and not of_a_mean(graph.records[site])
    )


def _term_counts(graph: ChannelGraph, mask: np.ndarray) -> dict[Site, tuple[int, Any]]:
    return term_counts(
        graph.closed,
        graph.records,
        lambda value, shape: kept_shape(graph, mask, value.axes, shape),
    )


def _explain(
    graph: ChannelGraph, mask: np.ndarray, literals: Mapping[Site, list[Any]]
) -> Aligned:
    """Every number that differs counts the terms of a mean, is made up for by the
    weights, or is of no use; any other is an error."""
    changed = {
        site
        for site, values in literals.items()
        if not _alike(graph.records[site].eqn, values)
    }
    if not changed:
        return Aligned()
    counts = _term_counts(graph, mask)
    means: dict[Site, list[Any]] = {}
    others = dict(literals)
    for site in changed & counts.keys():
        place, number = counts[site]
        rest = list(literals[site])
        if np.isclose(rest[place], number, rtol=1e-6):
            means[site] = [None] * len(rest)
            means[site][place] = literals[site][place]
            rest[place] = graph.records[site].eqn.invars[place].val
            others[site] = rest
    wiring = graph.wiring
    left = {s for s in changed if not _alike(graph.records[s].eqn, others[s])}
    if not left - wiring.dead:
        return Aligned(means)
    folded = fold_constants(graph, others)
    for site in sorted(left - wiring.dead - folded.sites):
        eqn = graph.records[site].eqn
        old, new = next(
            (np.asarray(a.val), np.asarray(b))
            for a, b in zip(eqn.invars, others[site], strict=True)
            if isinstance(a, jex.Literal) and not _equal(a.val, b)
        )
        raise EmissionError(
            f"{eqn.primitive.name} at {source_line(eqn) or site} takes a number that "
            f"the source computes from a width: {old} in the original, {new} in the "
            "slim model, and no weights can make up for it. Keep that group whole, or "
            "shrink with replay=True, which keeps the number"
        )
    return Aligned(means, folded)


def _alike(eqn: jex.JaxprEqn, values: Sequence[Any]) -> bool:
    return all(
        not isinstance(atom, jex.Literal) or _equal(atom.val, value)
        for atom, value in zip(eqn.invars, values, strict=True)
    )


def _equal(a: Any, b: Any) -> bool:
    if a is b:
        return True
    a, b = np.asarray(a), np.asarray(b)
    return np.array_equal(a, b, equal_nan=bool(jnp.issubdtype(a.dtype, np.inexact)))


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
    check_constants(full, slim)
    wires = dict(zip(full.jaxpr.constvars, slim.jaxpr.constvars, strict=True))
    wires.update(zip(full.jaxpr.invars, slim.jaxpr.invars, strict=True))
    pairs = zip(full.jaxpr.eqns, slim.jaxpr.eqns, strict=True)
    for number, (eqn, other) in enumerate(pairs):
        here = (*site, number)
        record = graph.records[here]
        check_operands(wires, eqn.invars, other.invars, record.name, here)
        if here not in graph.wiring.dead:
            _check_results(graph, mask, record, other, here)
            check_params(eqn, other, here)
            _check_starts(graph, mask, record, other, here)
            _check_positions(graph, mask, record, here)
        literals[here] = [
            atom.val if isinstance(atom, jex.Literal) else None for atom in other.invars
        ]
        wires.update(zip(eqn.outvars, other.outvars, strict=True))
        inner = list(zip(sub_jaxprs(eqn), sub_jaxprs(other), strict=True))
        for branch, (a, b) in enumerate(inner):
            deeper = (
                here if len(inner) == 1 and record.name != "cond" else (*here, branch)
            )
            _align(graph, mask, a, b, deeper, literals)
    check_operands(wires, full.jaxpr.outvars, slim.jaxpr.outvars, "result", site)


def _check_results(graph, mask, record, other, here: Site) -> None:
    """Every result has the shape that is left of it."""
    for value, var, found in zip(
        record.outputs, record.eqn.outvars, other.outvars, strict=True
    ):
        expected = kept_shape(graph, mask, value.axes, var.aval.shape)
        if expected != tuple(found.aval.shape):
            raise EmissionError(
                f"a size did not follow at {record.name} {here}: expected shape "
                f"{expected}, found {tuple(found.aval.shape)}"
            )


def kept_shape(graph: ChannelGraph, mask: np.ndarray, axes, shape) -> tuple[int, ...]:
    """The shape that is left under a channel mask."""
    return tuple(
        size if axis is None else int(axis_mask(graph, mask, axis).sum())
        for axis, size in zip(axes, shape, strict=True)
    )


def axis_mask(graph: ChannelGraph, mask: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """bool array (n,): which indices of a node vector are kept."""
    return graph.kept_nodes(mask)[axis]


def _check_starts(graph, mask, record, other, here) -> None:
    if record.name != "slice":
        return
    source, params = record.inputs[0].axes, record.eqn.params
    starts = params["start_indices"]
    for axis, start, found, stride in zip(
        source,
        starts,
        other.params["start_indices"],
        params["strides"] or (1,) * len(starts),
        strict=True,
    ):
        kept = start
        if axis is not None and stride == 1:  # else: the first of every pair
            kept = axis_mask(graph, mask, axis)[:start].sum()
        if int(kept) != found:
            raise EmissionError(
                f"a slice did not follow at {here}: expected start {int(kept)}, found "
                f"{found}"
            )


def _check_positions(graph, mask, record, here) -> None:
    """Positions that the source counts anew would not be those of the kept channels."""
    if record.name != "iota":
        return
    axis = record.outputs[0].axes[record.eqn.params["dimension"]]
    if axis is not None and not axis_mask(graph, mask, axis).all():
        raise EmissionError(
            f"positions along a channel axis (iota {here}) are counted anew by the slim "
            "model: the angles of the channels that are left would change. Keep that "
            "group whole, or shrink with replay=True"
        )

"""The static check of a plan: the slim program is the original's, only smaller.

The slim model is traced abstractly and held against the original's records: the same
primitives in the same order, every shape as predicted, slices that start at the kept
count before them, the same numbers but for those that count the terms of a mean and
those that weights make up for (`jaxprune.rescale`). Numbers that modules state are made
to follow (`jaxprune.attributes`). A width that did not follow, or a branch on a shape
that flipped, is found before anyone runs the model.
"""

# JAX types `aval` as its base class, which has no shape, and `val` as no attribute.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import functools
import linecache
import os
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxprune.alignment import Difference, kept_shape, same_program
from jaxprune.attributes import Attempt, Rows, raised_at, search
from jaxprune.conv import plain_convolutions
from jaxprune.einsums import Orders, pinned, recorded
from jaxprune.errors import EmissionError, first_line
from jaxprune.frameworks.stated import merged
from jaxprune.graph import ChannelGraph, Site
from jaxprune.graph.interpret import source_line
from jaxprune.graph.means import Divisor, divisor_at, of_a_mean, term_counts
from jaxprune.records import Plan
from jaxprune.rescale import Folded, fold_constants
from jaxprune.slicing import slice_variables


@dataclass(frozen=True, eq=False)
class Aligned:
    """What of the numbers in the slim program differs from the original's.

    Attributes:
      numbers: that modules state and that follow, as rows of a handle's settings.
      means: literals, by call site, that count terms, at their new values; None for
        each that is the original's.
      folded: what the weights take up for the others.
    """

    numbers: Rows = ()
    means: Mapping[Site, Sequence[Any]] = field(default_factory=dict)
    folded: Folded = field(default_factory=Folded)


def slim_settings(graph: ChannelGraph, plan: Plan, numbers: Rows = ()) -> Any:
    """What the smaller model needs beside its arrays, of earlier rounds too; JSON-ready.

    numbers: those that follow, from `align`.
    """
    counts = graph.handle.settings(graph.notes, graph.layer_masks(plan))
    return merged(graph.handle.stated, counts, numbers)


def slim_handle(graph: ChannelGraph, plan: Plan, small: Any, numbers: Rows = ()) -> Any:
    """The handle of the smaller model for sliced variables (real or abstract)."""
    settings = slim_settings(graph, plan, numbers)
    try:
        return graph.handle.rebuild(small, settings)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise EmissionError(
            f"{type(graph.handle.model).__name__} could not be rebuilt from the "
            f"sliced arrays: {error}"
        ) from error


# Plans whose check is kept.
_REMEMBERED = 16


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
    numbers, literals = search(graph, mask, functools.partial(_attempt, graph, plan))
    found = replace(_explain(graph, mask, literals), numbers=numbers)
    # Asked for again by the proof, and where the best of several plans is taken: what
    # was learned from others since then could lead the search elsewhere.
    while len(graph.aligned) >= _REMEMBERED:
        del graph.aligned[next(iter(graph.aligned))]
    graph.aligned[mask.tobytes()] = found
    return found


def _attempt(graph: ChannelGraph, plan: Plan, numbers: Rows) -> Attempt:
    """Traces the slim model with some of its numbers changed, and compares; if they
    differ, with its einsums in the original's orders, which change no result."""
    found = _compared(graph, plan, numbers, {})
    orders = _orders(graph) if found.error is not None else {}
    return _compared(graph, plan, numbers, orders) if orders else found


_ORDERS: weakref.WeakKeyDictionary[ChannelGraph, Orders] = weakref.WeakKeyDictionary()


def _orders(graph: ChannelGraph) -> Orders:
    """Of the original's einsums of three arrays and more, by tracing it again."""
    if graph not in _ORDERS:
        orders: Orders = {}
        structs = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), graph.variables
        )
        with recorded(orders):
            jax.eval_shape(
                lambda v, i: graph.handle.trace({}, v, *i), structs, graph.inputs
            )
        _ORDERS[graph] = orders
    return _ORDERS[graph]


def _compared(
    graph: ChannelGraph, plan: Plan, numbers: Rows, orders: Orders
) -> Attempt:
    structs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), graph.variables
    )
    small = slice_variables(graph, plan, structs)
    handle = slim_handle(graph, plan, small, numbers)
    raised: list[Exception] = []

    def run(variables: Any, inputs: Any) -> Any:
        try:
            return handle.trace({}, variables, *inputs)
        except Exception as error:  # noqa: BLE001  (the user's source may raise any)
            raised.append(error)
            return ()

    with plain_convolutions(), pinned(orders):
        slim = jax.make_jaxpr(run)(small, graph.inputs)
    try:
        literals = same_program(graph, graph.unit_mask(plan), slim, ended=not raised)
    except Difference as error:
        return Attempt(error=error)
    if not raised:
        return Attempt(literals)
    (error,) = raised
    found = Difference(
        "the slim model cannot be traced, because a size in its source did not "
        "follow its arrays, or a comparison of sizes came out otherwise: "
        f"{_said(error)}; keep that group whole",
        (len(slim.jaxpr.eqns),),
    )
    found.__cause__ = error
    return Attempt(error=found, places=raised_at(error))


def _said(error: Exception) -> str:
    """Its first line; of an assertion without words the line of the source."""
    places = raised_at(error)
    if str(error).strip() or not places:
        return first_line(error)
    file, line = places[0]
    source = linecache.getline(file, line).strip()
    return f"{type(error).__name__} at {os.path.basename(file)}:{line} ({source})"


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
        return Aligned(means=means)
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
    return Aligned(means=means, folded=folded)


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

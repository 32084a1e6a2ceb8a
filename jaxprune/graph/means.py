"""Numbers of a program that count the terms of a sum: the divisors of means."""

# JAX types `aval` as its base class, which has no shape, and `val` as no attribute.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.extend import core as jex

from jaxprune.graph.evaluate import sub_jaxprs
from jaxprune.graph.interpret import Record, Site, Value, is_user_file, source_line
from jaxprune.graph.rules.control import CALLS

Shape = tuple[int, ...]
# What a plan leaves of the shape of an array.
Left = Callable[[Value, Shape], Shape]
# A number that a source line divides by.
Divisor = tuple[str, float]
# Functions of JAX and Flax whose divisors are the number of terms.
_MEANS = frozenset(
    """mean _mean nanmean var _var nanvar std _std nanstd average _average standardize
    _compute_stats""".split()
)
_PASSED = frozenset(
    "convert_element_type broadcast_in_dim reshape squeeze transpose copy".split()
)


def term_counts(
    closed: jex.ClosedJaxpr, records: Mapping[Site, Record], left: Left
) -> dict[Site, tuple[int, Any]]:
    """{site: (operand, number)} for what makes means of sums that lose terms.

    A literal that a sum of n terms is divided by counts the terms left if it is n, or if
    it is the n of n - ddof (`jnp.var`). The mean of a layer normalisation is of that
    kind: it is of the channels that are left. Other numbers (1 / n, n - 1) may be what
    they are by chance, and are taken for nothing else.

    Args:
      closed: the full-size program.
      records: of its call sites.
      left: the shape that is left of an array.
    """
    found: dict[Site, tuple[int, Any]] = {}
    _walk(closed.jaxpr, (), {}, records, left, found)
    return found


def divisor_at(record: Record, place: int) -> Divisor:
    """The user's source line of a division, and the number there."""
    return source_line(record.eqn), float(record.eqn.invars[place].val)


def of_a_mean(record: Record) -> bool:
    """True if jnp.mean or its like divides: the number counts terms for sure.

    A division in the user's own source may be by another number of that size.
    """
    traceback = getattr(record.eqn.source_info, "traceback", None)
    for frame in traceback.frames if traceback else ():
        if is_user_file(frame.file_name):
            return False
        if frame.function_name in _MEANS:
            return True
    return False


def _walk(
    jaxpr: Any,
    site: Site,
    terms: dict[Any, tuple[int, int]],
    records: Mapping[Site, Record],
    left: Left,
    found: dict[Site, tuple[int, Any]],
) -> None:
    """terms: {variable of this jaxpr: (terms in all, terms left) of the sum it is}."""
    reduced: dict[Any, Site] = {}  # by "number - something"
    for number, eqn in enumerate(jaxpr.eqns):
        here = (*site, number)
        record = records[here]
        held = [terms.get(a) if not _literal(a) else None for a in eqn.invars]
        if record.name == "reduce_sum":
            terms[eqn.outvars[0]] = _summed(record, left, held[0] or (1, 1))
        elif record.name in _PASSED and held[0]:
            terms[eqn.outvars[0]] = held[0]
        elif record.name == "div" and held[0]:
            divisor, (full, kept) = eqn.invars[1], held[0]
            if _literal(divisor):
                source, place, atom = here, 1, divisor
            elif divisor in reduced:
                source, place = reduced[divisor], 0
                atom = records[source].eqn.invars[0]
            else:
                continue
            if not np.ndim(atom.val) and full == atom.val != kept:
                found[source] = place, np.asarray(kept, atom.aval.dtype)[()]
        elif (
            record.name == "sub"
            and _literal(eqn.invars[0])
            and not eqn.outvars[0].aval.shape
        ):
            reduced[eqn.outvars[0]] = here
        inner = sub_jaxprs(eqn)
        for branch, deeper in enumerate(inner):
            single = len(inner) == 1 and record.name != "cond"
            given: dict[Any, tuple[int, int]] = {}
            if record.name in CALLS:
                pairs = zip(deeper.jaxpr.invars, held, strict=True)
                given = {var: count for var, count in pairs if count is not None}
            _walk(
                deeper.jaxpr,
                here if single else (*here, branch),
                given,
                records,
                left,
                found,
            )
            if record.name in CALLS:
                for var, result in zip(eqn.outvars, deeper.jaxpr.outvars, strict=True):
                    if not _literal(result) and result in given:
                        terms[var] = given[result]


def _literal(atom: Any) -> bool:
    return isinstance(atom, jex.Literal)


def _summed(record: Record, left: Left, before: tuple[int, int]) -> tuple[int, int]:
    """How many terms the result of a reduce_sum has, in all and left."""
    shape = tuple(record.eqn.invars[0].aval.shape)
    small = left(record.inputs[0], shape)
    axes = record.eqn.params["axes"]
    return (
        before[0] * math.prod(shape[axis] for axis in axes),
        before[1] * math.prod(small[axis] for axis in axes),
    )

"""Reductions over channels in a network that keeps its size.

A norm of the slim network runs over the channels that are left, while zero rows of a
consumer's kernel leave a full-size network's norm as it was. Here removed channels take
no part: they are neutral before every reduction, and means count the terms that are left.
"""

# JAX types `aval` as its base class, which has no shape, and `val` as no attribute.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxprune.graph.evaluate import Before
from jaxprune.graph.graph import ChannelGraph
from jaxprune.graph.interpret import Record, Site
from jaxprune.graph.means import term_counts
from jaxprune.records import Plan

# What a removed entry must be for a reduction over it to pass it by; 0 for the others.
NEUTRAL = {
    "reduce_max": -np.inf,
    "argmax": -np.inf,
    "reduce_min": np.inf,
    "argmin": np.inf,
    "reduce_prod": 1.0,
    "reduce_and": True,
}


class Left(NamedTuple):
    """What a plan leaves, as arguments of a compiled program.

    Attributes:
      masks: bool arrays (n,), of each axis that is reduced.
      counts: numbers, of each mean.
    """

    masks: list[np.ndarray]
    counts: list[Any]


class Reductions:
    """The reductions over channels that can go, by call site.

    Args:
      graph: whose sites the program has.
    """

    def __init__(self, graph: ChannelGraph):
        self._graph = graph
        self._axes: list[np.ndarray] = []
        # By site, (dimension of the first operand, number of its axis).
        self._places: dict[Site, list[tuple[int, int]]] = {}
        known: dict[int, int] = {}
        for site, record in graph.records.items():
            for dim in _reduced(record):
                axis = record.inputs[0].axes[dim]
                if axis is None or not (graph.needs(axis) >= 0).any():
                    continue
                if id(axis) not in known:
                    known[id(axis)] = len(self._axes)
                    self._axes.append(axis)
                self._places.setdefault(site, []).append((dim, known[id(axis)]))
        self._counts: dict[Site, tuple[int, Any]] = {}
        if self._places:
            most = {g.name: np.arange(max(g.size - 1, 1)) for g in graph.groups}
            for site, (place, _) in self._term_counts(most).items():
                self._counts[site] = (
                    place,
                    _number(graph.records[site].eqn.invars[place]),
                )

    def __bool__(self) -> bool:
        return bool(self._places)

    def _term_counts(
        self, plan: Plan | Mapping[str, Any]
    ) -> dict[Site, tuple[int, Any]]:
        nodes = self._graph.kept_nodes(self._graph.unit_mask(plan))

        def left(value: Any, shape: Sequence[int]) -> tuple[int, ...]:
            return tuple(
                size if axis is None else int(nodes[axis].sum())
                for axis, size in zip(value.axes, shape, strict=True)
            )

        return term_counts(self._graph.closed, self._graph.records, left)

    def left(self, plan: Plan | Mapping[str, Any] | None) -> Left | None:
        """For `before`; None where there is nothing to pass by."""
        if plan is None or not self._places:
            return None
        nodes = self._graph.kept_nodes(self._graph.unit_mask(plan))
        changed = self._term_counts(plan)
        counts = [
            changed[site][1] if site in changed else number
            for site, (_, number) in self._counts.items()
        ]
        return Left([nodes[axis] for axis in self._axes], counts)

    def first(self, plan: Plan | Mapping[str, Any]) -> Site | None:
        """The first reduction that loses something under a plan."""
        nodes = self._graph.kept_nodes(self._graph.unit_mask(plan))
        lose = [not nodes[axis].all() for axis in self._axes]
        changed = [s for s, at in self._places.items() if any(lose[k] for _, k in at)]
        return min(changed, default=None)

    def before(self, left: Left) -> Before:
        """The hook that lets a full-size program pass removed channels by."""
        numbers = dict(zip(self._counts, left.counts, strict=True))

        def before(site: Site, eqn: jex.JaxprEqn, operands: list[Any]) -> list[Any]:
            operands = list(operands)
            if site in numbers:
                operands[self._counts[site][0]] = numbers[site]
            neutral = NEUTRAL.get(eqn.primitive.name, 0)
            for dim, number in self._places.get(site, ()):
                operands[0] = silence(operands[0], dim, left.masks[number], neutral)
            return operands

        return before


def silence(array: Any, dim: int, kept: Any, value: Any = 0) -> Any:
    """The array with a value where the mask (n,) over one of its axes is False."""
    shape = [1] * array.ndim
    shape[dim] = array.shape[dim]
    other = jnp.asarray(value, array.dtype)
    return jnp.where(jnp.asarray(kept).reshape(shape), array, other)


def _number(atom: Any) -> Any:
    return np.asarray(atom.val, atom.aval.dtype)[()]


def _reduced(record: Record) -> Sequence[int]:
    """The axes of the first operand over which an equation sums, and the like."""
    name, params = record.name, record.eqn.params
    if name.startswith("reduce_") or name in ("argmax", "argmin"):
        return params.get("axes", ())
    if name == "dot_general" and not any(value.pure for value in record.inputs):
        return params["dimension_numbers"][0][0]
    return ()

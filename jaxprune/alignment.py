"""A slim program held against the original's, equation by equation."""

# JAX types `aval` as its base class, which has no shape, and `val` as no attribute.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jax.extend import core as jex

from jaxprune.equations import check_constant, check_operands, check_params
from jaxprune.errors import EmissionError
from jaxprune.graph import ChannelGraph, Record, Site
from jaxprune.graph.evaluate import sub_jaxprs

# By site, the values of an equation's literals; None for its other operands.
Literals = dict[Site, list[Any]]
Axes = Sequence[np.ndarray | None]


class Difference(EmissionError):
    """The first difference between the two programs.

    Attributes:
      site: the call site of the original at which it shows.
    """

    def __init__(self, message: str, site: Site) -> None:
        super().__init__(message)
        self.site = site


def same_program(
    graph: ChannelGraph, mask: np.ndarray, slim: jex.ClosedJaxpr, *, ended: bool = True
) -> Literals:
    """The numbers of a slim program that is the original's, only smaller.

    Args:
      mask: bool array (units,), the channels kept.
      ended: False for the beginning of a program whose source then raised.

    Raises:
      Difference: it is another program.
    """
    literals: Literals = {}
    kept = _Kept(graph.kept_nodes(mask))
    _align(graph, kept, graph.closed, slim, (), literals, ended)
    return literals


class _Kept:
    """What a channel mask keeps of the program's axes; counted once for all arrays that
    share one."""

    def __init__(self, nodes: np.ndarray):
        self._nodes = nodes
        self._counts: dict[int, tuple[np.ndarray, int]] = {}

    def of(self, axis: np.ndarray) -> np.ndarray:
        """bool array (n,): which indices of a node vector are kept."""
        return self._nodes[axis]

    def count(self, axis: np.ndarray) -> int:
        known = self._counts.get(id(axis))
        if known is None:  # the axis is held, or another could get its id
            known = (axis, int(np.count_nonzero(self.of(axis))))
            self._counts[id(axis)] = known
        return known[1]

    def whole(self, axis: np.ndarray | None) -> bool:
        return axis is None or self.count(axis) == axis.size

    def shape(self, axes: Axes, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that is left."""
        return tuple(
            size if axis is None else self.count(axis)
            for axis, size in zip(axes, shape, strict=True)
        )


def _align(
    graph: ChannelGraph,
    kept: _Kept,
    full: jex.ClosedJaxpr,
    slim: jex.ClosedJaxpr,
    site: Site,
    literals: Literals,
    ended: bool = True,
) -> None:
    wires = dict(zip(full.jaxpr.invars, slim.jaxpr.invars, strict=True))
    held = dict(zip(full.jaxpr.constvars, full.consts, strict=True))
    constants = zip(full.jaxpr.constvars, slim.jaxpr.constvars, strict=False)
    found = dict(zip(slim.jaxpr.constvars, slim.consts, strict=True))
    alike = {a: (b, held[a], found[b]) for a, b in constants}
    equations = full.jaxpr.eqns
    others = deque(slim.jaxpr.eqns)

    def meet_constants(eqn: jex.JaxprEqn) -> None:
        for atom in eqn.invars:
            if not isinstance(atom, jex.Literal) and atom in alike:
                var, *values = alike.pop(atom)
                check_constant(*values)
                wires[atom] = var

    last = 0  # the first equation that the slim program has none for
    for last, eqn in enumerate((*equations, None)):
        here, other = (*site, last), others[0] if others else None
        if eqn is None:
            break
        record = graph.records[here]
        with _located(here):
            if _changes_nothing(kept, record):
                meet_constants(eqn)
                if not _broadcasts(other, wires.get(eqn.invars[0])):
                    wires[eqn.outvars[0]] = wires.get(eqn.invars[0])
                    literals[here] = [None]
                    continue
            if other is None:
                break
            _same_operation(eqn, other, here)
            meet_constants(eqn)
            check_operands(wires, eqn.invars, other.invars, record.name, here)
            if here not in graph.wiring.dead:
                _check_positions(kept, record, here)
                _check_results(kept, record, other, here)
                check_params(eqn, other, here)
                _check_starts(kept, record, other, here)
        others.popleft()
        literals[here] = [
            atom.val if isinstance(atom, jex.Literal) else None for atom in other.invars
        ]
        wires.update(zip(eqn.outvars, other.outvars, strict=True))
        inner = list(zip(sub_jaxprs(eqn), sub_jaxprs(other), strict=True))
        for branch, (a, b) in enumerate(inner):
            single = len(inner) == 1 and record.name != "cond"
            _align(graph, kept, a, b, here if single else (*here, branch), literals)
    if not ended:
        return
    with _located((*site, last)):
        a = equations[last] if last < len(equations) else None
        _same_operation(a, others[0] if others else None, (*site, last))
        for var, *values in alike.values():  # handed on as they are
            check_constant(*values)
        wires.update({a: var for a, (var, *_) in alike.items()})
        check_operands(wires, full.jaxpr.outvars, slim.jaxpr.outvars, "result", site)


@contextlib.contextmanager
def _located(site: Site) -> Iterator[None]:
    try:
        yield
    except Difference:
        raise
    except EmissionError as error:
        raise Difference(str(error), site) from error


def _changes_nothing(kept: _Kept, record: Record) -> bool:
    """Whether the record is a broadcast along axes of which one entry is left: JAX writes
    no equation for that of a mask over heads, say, to the one head that is left."""
    if record.name != "broadcast_in_dim" or isinstance(
        record.eqn.invars[0], jex.Literal
    ):
        return False
    before, after = record.eqn.invars[0].aval.shape, record.eqn.outvars[0].aval.shape
    if record.eqn.params["broadcast_dimensions"] != tuple(range(len(after))):
        return False
    shapes = zip((*record.inputs[:1], *record.outputs), (before, after), strict=True)
    left = [kept.shape(value.axes, shape) for value, shape in shapes]
    return before != after and left[0] == left[1]


def _broadcasts(other: Any, operand: Any) -> bool:
    return (
        other is not None
        and other.primitive.name == "broadcast_in_dim"
        and other.invars[0] is operand
    )


def _same_operation(eqn: Any, other: Any, here: Site) -> None:
    names = [e.primitive.name if e is not None else "nothing" for e in (eqn, other)]
    if names[0] != names[1]:
        raise EmissionError(
            "the slim model runs other operations than the original: at equation "
            f"{here} expected {names[0]}, found {names[1]}; a branch in its source "
            "depends on a size that changed (an axis with one entry left is squeezed by "
            "matmul and einsum). Keep that group whole, or two of its channels"
        )


def _check_results(kept: _Kept, record: Record, other: Any, here: Site) -> None:
    """Every result has the shape that is left of it."""
    for value, var, found in zip(
        record.outputs, record.eqn.outvars, other.outvars, strict=True
    ):
        expected = kept.shape(value.axes, var.aval.shape)
        if expected != tuple(found.aval.shape):
            raise EmissionError(
                f"a size did not follow at {record.name} {here}: expected shape "
                f"{expected}, found {tuple(found.aval.shape)}"
            )


def kept_shape(
    graph: ChannelGraph, mask: np.ndarray, axes: Axes, shape: Sequence[int]
) -> tuple[int, ...]:
    """The shape that is left under a channel mask."""
    return _Kept(graph.kept_nodes(mask)).shape(axes, shape)


def axis_mask(graph: ChannelGraph, mask: np.ndarray, axis: np.ndarray) -> np.ndarray:
    """bool array (n,): which indices of a node vector are kept."""
    return graph.kept_nodes(mask)[axis]


def _check_starts(kept: _Kept, record: Record, other: Any, here: Site) -> None:
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
        expected = start
        if axis is not None and stride == 1:  # else: the first of every pair
            expected = int(kept.of(axis)[:start].sum())
        if expected != found:
            raise EmissionError(
                f"a slice did not follow at {here}: expected start {expected}, found "
                f"{found}"
            )


def _check_positions(kept: _Kept, record: Record, here: Site) -> None:
    """Positions that the source counts anew would not be those of the kept channels,
    and numbers of channels that it states would point at others."""
    if record.name == "gather":
        picked = record.eqn.params["dimension_numbers"].collapsed_slice_dims
        if not all(kept.whole(record.inputs[0].axes[dim]) for dim in picked):
            raise EmissionError(
                f"the source picks channels by their numbers (gather {here}), which "
                "change. Keep that group whole, or shrink with replay=True"
            )
    if record.name != "iota":
        return
    if not kept.whole(record.outputs[0].axes[record.eqn.params["dimension"]]):
        raise EmissionError(
            f"positions along a channel axis (iota {here}) are counted anew by the slim "
            "model: the angles of the channels that are left would change. Keep that "
            "group whole, or shrink with replay=True"
        )

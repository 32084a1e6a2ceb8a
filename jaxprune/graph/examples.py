"""Where the examples of a batch lie in each array of a program.

Most arrays have them on their first axis. Time-major recurrences do not, and windows
or frames that are batched (Swin, a CNN on every frame) lie on one axis with them. The
program for B examples is compared with the one for a few more: the axis whose size
changes holds the examples, and the order on a merged one follows from the reshapes.
"""

# JAX types `aval` as its base class, which has no shape.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from jaxprune.conv import plain_convolutions
from jaxprune.graph.graph import ChannelGraph
from jaxprune.graph.interpret import Site
from jaxprune.graph.rules.control import CALLS, inner_jaxpr

# What may bring the rows of a merged axis into another order.
REORDERS = frozenset("rev sort gather scatter top_k scan while cond".split())


@dataclass(frozen=True)
class Layout:
    """Where B examples lie in an array.

    Attributes:
      size: B.
      axis: the axis that holds them; None for an array that all examples share.
      outer, inner: what they are merged with: the axis is (outer, B, inner).
    """

    size: int
    axis: int | None
    outer: int = 1
    inner: int = 1

    @property
    def merged(self) -> int:
        """Rows of the axis for each example."""
        return self.outer * self.inner

    def moved(self, axes: Sequence[int]) -> Layout:
        """Of the array transposed by `axes`."""
        axis = None if self.axis is None else tuple(axes).index(self.axis)
        return Layout(self.size, axis, self.outer, self.inner)

    def first(self, array: jax.Array) -> jax.Array:
        """The array with the examples, and nothing else, on its first axis.

        What they were merged with stays where they were, as an axis of its own; shared
        arrays are repeated.
        """
        if self.axis is None:
            return jnp.broadcast_to(array, (self.size, *array.shape))
        before, after = array.shape[: self.axis], array.shape[self.axis + 1 :]
        parts = array.reshape(*before, self.outer, self.size, self.inner, *after)
        parts = jnp.moveaxis(parts, self.axis + 1, 0)
        beside = (self.merged,) if self.merged > 1 else ()
        return parts.reshape(self.size, *before, *beside, *after)

    def last(self, values: jax.Array) -> jax.Array:
        """Values (B, n) of the examples for each index of the axis, (outer B inner, n)."""
        shape = (self.outer, self.size, self.inner, values.shape[1])
        return jnp.broadcast_to(values[None, :, None], shape).reshape(-1, shape[-1])


class Layouts(NamedTuple):
    """Layouts of all arrays; None where it cannot be told.

    Attributes:
      operands, results: by call site.
      outputs: of the program, flat.
    """

    operands: dict[Site, list[Layout | None]]
    results: dict[Site, list[Layout | None]]
    outputs: list[Layout | None]


_KNOWN: WeakKeyDictionary[ChannelGraph, Layouts] = WeakKeyDictionary()


def layouts(graph: ChannelGraph) -> Layouts:
    """Of the graph's program, in which the inputs have the examples first.

    Where the model does not run on more examples, or becomes another program, what has
    as many entries on its first axis as the inputs is taken to have the examples there.
    """
    if graph not in _KNOWN:
        _KNOWN[graph] = _find(graph)
    return _KNOWN[graph]


class _OtherProgram(Exception):
    """The program for more examples has other equations."""


def _find(graph: ChannelGraph) -> Layouts:
    leaves = jax.tree.leaves(graph.inputs)
    size = next((leaf.shape[0] for leaf in leaves if leaf.shape), 1)
    for more in (size + 1, 2 * size):
        other = _program(graph, size, more)
        with suppress(_OtherProgram):
            if other is not None:
                return _Walk(size, more).program(graph.closed, other)
    return _Walk(size, size).program(graph.closed, graph.closed)


def _program(graph: ChannelGraph, size: int, more: int) -> jex.ClosedJaxpr | None:
    """The program for another number of examples; None if the source refuses it."""

    def longer(leaf: Any) -> jax.ShapeDtypeStruct:
        shape = leaf.shape
        if shape[:1] == (size,):
            shape = (more, *shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    inputs = jax.tree.map(longer, graph.inputs)
    with plain_convolutions(), suppress(Exception):
        return jax.make_jaxpr(lambda v, i: graph.handle.trace({}, v, *i))(
            graph.variables, inputs
        )
    return None


class _Walk:
    """Two programs side by side, for `size` examples and for `more`."""

    def __init__(self, size: int, more: int):
        self._size, self._more = size, more
        self._found = Layouts({}, {}, [])

    def program(self, closed: jex.ClosedJaxpr, other: jex.ClosedJaxpr) -> Layouts:
        given = [
            self._alone(*shapes)
            for shapes in _shapes(closed.jaxpr.invars, other.jaxpr.invars)
        ]
        outputs = self._closed(closed.jaxpr, other.jaxpr, given, ())
        return self._found._replace(outputs=outputs)

    def _closed(
        self,
        jaxpr: jex.Jaxpr,
        other: jex.Jaxpr,
        given: Sequence[Layout | None],
        site: Site,
    ) -> list[Layout | None]:
        known: dict[Any, Layout | None] = dict(zip(jaxpr.invars, given, strict=True))
        shared = Layout(self._size, None)

        def read(atom: Any) -> Layout | None:
            return shared if isinstance(atom, jex.Literal) else known.get(atom, shared)

        if len(jaxpr.eqns) != len(other.eqns):
            raise _OtherProgram
        for number, pair in enumerate(zip(jaxpr.eqns, other.eqns, strict=True)):
            if pair[0].primitive is not pair[1].primitive:
                raise _OtherProgram
            here, operands = (*site, number), [read(atom) for atom in pair[0].invars]
            if pair[0].primitive.name in CALLS:
                inner = [inner_jaxpr(eqn).jaxpr for eqn in pair]
                results = self._closed(inner[0], inner[1], operands, here)
            else:
                results = self._results(*pair, operands)
                self._found.operands[here] = operands
                self._found.results[here] = results
            known.update(zip(pair[0].outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def _results(
        self, eqn: jex.JaxprEqn, other: jex.JaxprEqn, operands: list[Layout | None]
    ) -> list[Layout | None]:
        found = []
        for shape, changed in _shapes(eqn.outvars, other.outvars):
            layout = self._alone(shape, changed)
            if layout is not None and layout.merged > 1:
                layout = self._merged(eqn, operands, layout, shape)
            found.append(layout)
        return found

    def _alone(self, shape: Sequence[int], changed: Sequence[int]) -> Layout | None:
        """By shape alone: a merged axis counts as (B, inner)."""
        if self._more == self._size:  # nothing to compare with
            first = bool(shape) and shape[0] == self._size
            return Layout(self._size, 0) if first else None
        axes = [k for k, (a, b) in enumerate(zip(shape, changed)) if a != b]
        if len(shape) != len(changed) or len(axes) > 1:
            return None
        if not axes:
            return Layout(self._size, None)
        (axis,) = axes
        inner, left = divmod(shape[axis], self._size)
        if left or changed[axis] != inner * self._more:
            return None
        return Layout(self._size, axis, 1, inner)

    def _merged(
        self,
        eqn: jex.JaxprEqn,
        operands: Sequence[Layout | None],
        layout: Layout,
        shape: Sequence[int],
    ) -> Layout | None:
        """With the order on the axis, from the operands'."""
        if eqn.primitive.name == "reshape":
            return _reshaped(operands[0], eqn.invars[0].aval.shape, shape)
        joins = eqn.primitive.name == "concatenate"
        if joins and eqn.params["dimension"] == layout.axis:
            return _joined(operands, layout)
        if eqn.primitive.name in REORDERS:
            return None
        orders = {
            (known.outer, known.inner)
            for known in operands
            if known is not None and known.axis is not None
            if known.merged == layout.merged
        }
        if len(orders) != 1:
            return None
        return Layout(layout.size, layout.axis, *orders.pop())


def _shapes(one: Sequence[Any], other: Sequence[Any]) -> Iterator[Any]:
    for pair in zip(one, other, strict=True):
        yield tuple(getattr(atom.aval, "shape", ()) for atom in pair)


def _joined(operands: Sequence[Layout | None], whole: Layout) -> Layout | None:
    """Of arrays put one behind the other along the axis that holds the examples."""
    parts = [part for part in operands if part is not None and part.axis == whole.axis]
    inner = {part.inner for part in parts}
    if len(parts) != len(operands) or len(inner) != 1:
        return None
    outer = sum(part.outer for part in parts)
    return Layout(whole.size, whole.axis, outer, inner.pop())


def _reshaped(
    layout: Layout | None, old: Sequence[int], new: Sequence[int]
) -> Layout | None:
    """The axis of the new shape on which the examples lie, whole."""
    if layout is None or layout.axis is None:
        return None
    before = math.prod(old[: layout.axis]) * layout.outer
    after = layout.inner * math.prod(old[layout.axis + 1 :])
    for axis in range(len(new)):
        left, right = math.prod(new[:axis]), math.prod(new[axis + 1 :])
        if not left * right or before % left or after % right:
            continue
        if new[axis] == (before // left) * layout.size * (after // right):
            return Layout(layout.size, axis, before // left, after // right)
    return None

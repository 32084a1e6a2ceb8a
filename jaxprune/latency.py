"""Milliseconds of a plan on this device, from a table of its layers measured here.

Every contraction (convolution, matrix product) of the model is timed alone at a few
widths, once for each shape; in between the table is interpolated. Widths count as the
next multiple of `STEP`, because vector units and tensor cores work in such steps: what
is no multiple takes at least as long. What the layers leave of the whole model's time
(norms, activations, pooling) shrinks with the activations. Times of layers alone and in
the model differ, so one measurement of a slim model can correct the table.
"""

# JAX types `aval` as its base class, which has no shape.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxprune import cost
from jaxprune.check import align, slim_handle
from jaxprune.conv import plain_convolutions
from jaxprune.following import follow
from jaxprune.graph import ChannelGraph, Record
from jaxprune.graph.counts import Counter, Ledger, Terms, contraction_dims
from jaxprune.graph.evaluate import bind, sub_jaxprs
from jaxprune.records import Plan
from jaxprune.slicing import slice_variables

STEP = 8
# Widths at which a layer is timed, as shares of its own; `STEP` is another.
SHARES = (0.25, 0.5, 1.0)

# (function, *trees of shapes, repeats=, seconds=) -> milliseconds
Timer = Callable[..., float]
Progress = Callable[[str, int, int], None]
Keep = Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Contraction:
    """One contraction of the program, to be timed at any widths.

    Attributes:
      record: its equation.
      rows: the counter's rows of the axes that can shrink, each once.
      sizes: their full sizes.
      places: per operand and dimension, the place in `rows`, or -1.
    """

    record: Record
    rows: tuple[int, ...]
    sizes: tuple[int, ...]
    places: tuple[tuple[int, ...], ...]

    @property
    def key(self) -> Any:
        """Equal for contractions that take the same time at equal widths."""
        shapes = tuple(
            (v.aval.shape, str(v.aval.dtype)) for v in self.record.eqn.invars
        )
        name, params = self.record.name, str(self.record.eqn.params)
        return name, params, shapes, self.sizes, self.places

    def program(self, widths: Sequence[int]) -> tuple[Callable[..., Any], list[Any]]:
        """The contraction as a function of its operands, and their shapes."""
        eqn = self.record.eqn
        shapes = [list(var.aval.shape) for var in eqn.invars]
        for shape, places in zip(shapes, self.places, strict=True):
            for dim, place in enumerate(places):
                if place >= 0:
                    shape[dim] = widths[place]
        params = eqn.params
        if _grouped(eqn):
            share = widths[0] / self.sizes[0] if widths else 1.0
            shapes, params = _grouped_shapes(eqn, share)
        structs = [
            jax.ShapeDtypeStruct(tuple(shape), var.aval.dtype)
            for shape, var in zip(shapes, eqn.invars, strict=True)
        ]
        return lambda *operands: bind(eqn, operands, params), structs


@dataclass(frozen=True, eq=False)
class Layer:
    """Times of one contraction over the widths of its axes.

    Attributes:
      grids: ascending widths of each axis.
      ms: array with one axis for each grid; never falls along any.
    """

    grids: tuple[np.ndarray, ...]
    ms: np.ndarray

    def at(self, widths: Sequence[int]) -> float:
        """Milliseconds at these widths, linear in each between those measured."""
        table = self.ms
        for grid, width in zip(self.grids, widths, strict=True):
            if grid.size == 1:
                table = table[0]
                continue
            high = int(np.clip(np.searchsorted(grid, width), 1, grid.size - 1))
            part = (width - grid[high - 1]) / (grid[high] - grid[high - 1])
            part = min(max(part, 0.0), 1.0)
            table = (1 - part) * table[high - 1] + part * table[high]
        return float(table)


@dataclass(frozen=True, eq=False)
class LatencyTable:
    """Predicts the milliseconds of one batch under any plan of a graph.

    Attributes:
      graph: traced with the batch that is timed.
      layers: (times, rows of the counter, how often it runs).
      activations: elements of the contractions' results, for `rest_ms`.
      scale: of the layers' times, so that they do not exceed the model's.
      rest_ms: what the layers leave of the whole model's time.
      base_ms: the whole model's time, measured.
      known: (predicted before correction, measured) of slim models.
    """

    graph: ChannelGraph
    counter: Counter
    layers: tuple[tuple[Layer, tuple[int, ...], int], ...]
    activations: Terms
    scale: float
    rest_ms: float
    base_ms: float
    timer: Timer
    known: tuple[tuple[float, float], ...] = ()

    def predict(self, keep: Plan | Keep | None = None) -> float:
        """Milliseconds under a plan; never falls as channels are added."""
        ends = (0.0, 0.0), (self.base_ms, self.base_ms)
        raw, real = np.array(sorted((*ends, *self.known))).T
        real = np.maximum.accumulate(np.minimum(real, self.base_ms))
        return float(np.interp(self._raw(keep), raw, real))

    def _raw(self, keep: Plan | Keep | None) -> float:
        full = self.counter.sizes(np.ones(max(self.graph.channels.count, 1), bool))
        sizes = full
        if keep is not None and self.graph.channels.count:
            kept = self.counter.sizes(self.graph.unit_mask(keep))
            sizes = np.minimum(-(-kept // STEP) * STEP, full)
        layers = sum(
            repeat * layer.at(sizes[list(rows)].tolist())
            for layer, rows, repeat in self.layers
        )
        whole = self.activations.total(full)
        share = self.activations.total(sizes) / whole if whole else 1.0
        return self.scale * layers + share * self.rest_ms

    def measure(self, keep: Plan | Keep) -> float:
        """Milliseconds of the slim model, measured; its weights are zeros.

        The whole model is measured beside it, and the result scaled to `base_ms`:
        where other programs run, a device is faster at one time than at another.
        """
        graph, structs = self.graph, _structs(self.graph.variables)
        plan, _ = follow(graph, graph.complete(keep))
        small = slice_variables(graph, plan, structs)
        handle = slim_handle(graph, plan, small, align(graph, plan).numbers)
        slim = self.timer(lambda v, i: handle(v, *i), small, graph.inputs)
        now = self.timer(lambda v, i: graph.handle(v, *i), structs, graph.inputs)
        return slim * self.base_ms / now

    def corrected(self, keep: Plan | Keep, ms: float) -> LatencyTable:
        """The table that is right about this plan, whose latency was measured."""
        return replace(self, known=(*self.known, (self._raw(keep), ms)))


def with_batch(graph: ChannelGraph, batch: int | None) -> ChannelGraph:
    """The graph for inputs of `batch` examples; None leaves them as they were."""
    leaves = jax.tree.leaves(graph.inputs)
    if batch is None or not leaves or not leaves[0].shape:
        return graph
    before = leaves[0].shape[0]

    def resized(leaf: Any) -> Any:
        shape = leaf.shape
        if shape and shape[0] == before:
            shape = (batch, *shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    return graph.retrace(jax.tree.map(resized, graph.inputs))


def measure_latency(
    graph: ChannelGraph,
    *,
    timer: Timer | None = None,
    on_progress: Progress | None = None,
) -> LatencyTable:
    """The table of a model on this device, for the batch it was traced with.

    Compiles and times up to 16 small programs for each shape of contraction.

    Args:
      timer: (function, *trees of shapes, repeats=, seconds=) -> milliseconds; by
        default `jaxprune.cost.time_ms`.
      on_progress: (stage, done, total).
    """
    timer = timer or cost.time_ms
    ledger = Ledger(graph.needs, graph.channels.count)
    activations, found = Terms([], []), []
    for record in graph.records.values():
        contraction = _contraction(record, ledger)
        if contraction is None:
            continue
        found.append(contraction)
        shape = record.eqn.outvars[0].aval.shape
        constant, rows = ledger.term(
            list(zip(record.outputs[0].axes, shape, strict=True))
        )
        activations.coefficient.append(record.repeat * constant)
        activations.axes.append(rows)
    variables = _structs(graph.variables)
    base = timer(lambda v, i: graph.handle(v, *i), variables, graph.inputs)
    by_key: dict[Any, Layer] = {}
    unique = {contraction.key: contraction for contraction in found}
    with contextlib.ExitStack() as stack:
        if not _rewrites_convolutions(graph):
            stack.enter_context(plain_convolutions())
        idle = timer(lambda x: x, jax.ShapeDtypeStruct((), np.float32))
        for number, (key, contraction) in enumerate(unique.items()):
            by_key[key] = _timed(contraction, timer, idle)
            if on_progress is not None:
                on_progress("latency table", number + 1, len(unique))
    layers = tuple((by_key[c.key], c.rows, c.record.repeat) for c in found)
    total = sum(repeat * layer.ms.max() for layer, _, repeat in layers)
    scale = min(1.0, base / total) if total else 1.0
    return LatencyTable(
        graph, ledger.counter(), layers, activations, scale,
        max(base - scale * total, 0.0), base, timer,
    )  # fmt: skip


def _structs(tree: Any) -> Any:
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), tree)


def _contraction(record: Record, ledger: Ledger) -> Contraction | None:
    """The record as a contraction; None for other operations.

    One whose shapes can't be made alone counts with the rest of the model.
    """
    if (
        contraction_dims(record) is None
        or record.eqn.params.get("batch_group_count", 1) != 1
    ):
        return None
    eqn = record.eqn
    rows: list[int] = []
    sizes: list[int] = []

    def place(axis: Any, size: int) -> int:
        _, own = ledger.term([(axis, size)])
        if not own:
            return -1
        if own[0] not in rows:
            rows.append(own[0])
            sizes.append(size)
        return rows.index(own[0])

    def places(values: Any, variables: Any) -> tuple[tuple[int, ...], ...]:
        return tuple(
            tuple(itertools.starmap(place, zip(value.axes, v.aval.shape, strict=True)))
            for value, v in zip(values, variables, strict=True)
        )

    if _grouped(eqn):
        # All its axes shrink together: their share is that of the output.
        places(record.outputs, eqn.outvars)
        none = tuple((-1,) * len(v.aval.shape) for v in eqn.invars)
        made = Contraction(record, tuple(rows[:1]), tuple(sizes[:1]), none)
    else:
        found = places(record.inputs, eqn.invars)
        made = Contraction(record, tuple(rows), tuple(sizes), found)
    function, structs = made.program([max(1, size // 2) for size in made.sizes])
    try:
        jax.eval_shape(function, *structs)
    except (TypeError, ValueError):
        return None
    return made


def _grouped(eqn: Any) -> bool:
    return eqn.params.get("feature_group_count", 1) != 1


def _grouped_shapes(eqn: Any, share: float) -> tuple[list[Any], dict[str, Any]]:
    """Operand shapes and parameters of a grouped convolution at a share of its width.

    A depthwise one loses groups, any other loses channels of every group.
    """
    numbers, groups = eqn.params["dimension_numbers"], eqn.params["feature_group_count"]
    lhs, rhs = (list(var.aval.shape) for var in eqn.invars)
    out_dim, in_dim = numbers.rhs_spec[:2]
    inputs, outputs = rhs[in_dim], rhs[out_dim] // groups
    if inputs == 1:
        groups = max(1, round(share * groups))
    else:
        inputs = max(1, round(share * inputs))
        outputs = max(1, round(share * outputs))
    lhs[numbers.lhs_spec[1]] = groups * inputs
    rhs[in_dim], rhs[out_dim] = inputs, groups * outputs
    return [lhs, rhs], {**eqn.params, "feature_group_count": groups}


def _timed(contraction: Contraction, timer: Timer, idle: float) -> Layer:
    """The contraction's times on a grid of widths, less that of an empty program."""
    few = len(contraction.sizes) > 2
    grids = tuple(_grid(size, few) for size in contraction.sizes)
    ms = np.zeros([grid.size for grid in grids])
    for place in np.ndindex(*ms.shape):
        widths = [int(grid[i]) for grid, i in zip(grids, place, strict=True)]
        function, structs = contraction.program(widths)
        found = timer(function, *structs, repeats=10, seconds=0.2)
        ms[place] = max(found - idle, 0.0)
    # What takes longer than more channels do was disturbed, or could be padded.
    for axis in range(ms.ndim):
        ms = np.flip(np.minimum.accumulate(np.flip(ms, axis), axis), axis)
    return Layer(grids, ms)


def _grid(size: int, few: bool) -> np.ndarray:
    shares = SHARES[::2] if few else SHARES
    widths = {min(-(-round(share * size) // STEP) * STEP, size) for share in shares}
    if not few:
        widths.add(min(STEP, size))
    return np.array(sorted(max(width, 1) for width in widths))


def _rewrites_convolutions(graph: ChannelGraph) -> bool:
    """True if the model computes some convolutions by `jaxprune.conv`."""

    def count(closed: Any) -> int:
        total = 0
        for eqn in closed.jaxpr.eqns:
            inner = sub_jaxprs(eqn)
            total += sum(map(count, inner))
            total += eqn.primitive.name == "conv_general_dilated"
        return total

    real = jax.make_jaxpr(lambda v, i: graph.handle(v, *i))(
        _structs(graph.variables), graph.inputs
    )
    return count(real) < count(graph.closed)

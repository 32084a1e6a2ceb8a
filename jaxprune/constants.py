"""Removed channels that are constant by their weights alone, folded away exactly.

A channel whose producer column is zero, or whose BatchNorm scale is, has one value for
every input: what biases and shifts leave after the activation. Removing it takes that
value from its consumers, which can be given back without data: through the consumers'
kernels into the bias that follows, or the mean that the next BatchNorm subtracts. The
slim model then equals the original as it was, not only the masked one.
"""

# JAX types `aval` as its base class, which has no shape.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.alignment import axis_mask
from jaxprune.errors import GraphError
from jaxprune.graph import ChannelGraph, Record
from jaxprune.graph.evaluate import bind
from jaxprune.graph.flat import Flat, Step, flatten
from jaxprune.graph.interpret import VIEWS
from jaxprune.graph.rules.elementwise import ELEMENTWISE
from jaxprune.records import Plan
from jaxprune.slicing import checked_leaves


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of the channels on one axis of an array.

    Attributes:
      axis: the dimension.
      value: float64 (n,); the same at every place of the array, where `sure`.
      sure: bool (n,).
    """

    axis: int
    value: np.ndarray
    sure: np.ndarray


def fold_constants(
    graph: ChannelGraph, plan: Plan | Mapping[str, Any], variables: Any = None
) -> Any:
    """The full-size variables with what removed constant channels give moved on.

    `shrink(graph, plan, fold_constants(graph, plan))` then equals the original for
    channels that are constant by their weights alone. A channel is left alone unless
    all that read it can be made up for: contractions with a kernel of their own, whose
    windows see no padding (or the constant is zero), with a bias of their own or a
    BatchNorm mean behind them. Not through loops, branches or normalisations that run
    over channels.

    Args:
      graph: from `trace`.
      plan: what is kept.
      variables: arrays; by default those traced.

    Raises:
      PlanError: the plan does not fit the graph.
      GraphError: the variables are not those that were traced, or shapes alone.
    """
    plan = graph.complete(plan)
    source = graph.variables if variables is None else variables
    leaves = checked_leaves(graph, source)
    for path, leaf in leaves.items():
        if not hasattr(leaf, "__array__"):
            raise GraphError(
                f"expected an array at {path}, found its shape alone; pass "
                "fold_constants(graph, plan, variables=arrays)"
            )
    walk = _Walk(graph, graph.unit_mask(plan))
    walk.run([leaves[path] for path in graph.leaves])
    changed = {}
    for path, delta in walk.deltas().items():
        leaf = leaves[path]
        changed[path] = jnp.asarray(
            np.asarray(leaf, np.float64) + delta.reshape(leaf.shape), leaf.dtype
        )
    return trees.replace(source, changed) if changed else source


@dataclass(eq=False)
class _Walk:
    """Follows constants from array to array; collects what each consumer is owed.

    Attributes:
      blocked: channels that something reads in another way.
      owed: {leaf: [(channel, float64 (outputs,))]}, what its removal takes from it.
    """

    graph: ChannelGraph
    mask: np.ndarray
    blocked: set[int] = field(default_factory=set)
    owed: dict[str, list[tuple[int, np.ndarray]]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def run(self, leaves: list[Any]) -> None:
        records = self.graph.records
        flat = flatten(self.graph.closed, records, len(leaves))
        arrays: dict[int, Any] = dict(zip(flat.variables, leaves, strict=True))
        arrays |= flat.constants
        known: dict[int, Known] = {}
        for step in flat.steps:
            record = records[step.site]
            if step.pure:
                given = [
                    arrays[o] if isinstance(o, int) else o[0] for o in step.operands
                ]
                arrays.update(zip(step.results, bind(step.eqn, given), strict=True))
                self._block_what_ends_here(record)  # the norm of a kernel's rows
                continue
            found = self._step(flat, step, record, arrays, known)
            if found is not None:
                known[step.results[0]] = found

    def deltas(self) -> dict[str, np.ndarray]:
        """{leaf: what to add to it}, of the channels that nothing blocks."""
        sums = {
            path: sum((d for unit, d in rows if unit not in self.blocked), np.zeros(()))
            for path, rows in self.owed.items()
        }
        return {path: delta for path, delta in sums.items() if np.any(delta)}

    def _removed(self, axis: np.ndarray | None) -> dict[int, int]:
        """{index: channel} of what the plan removes on an axis; a product blocks all
        the channels it needs."""
        if axis is None or axis_mask(self.graph, self.mask, axis).all():
            return {}
        found = {}
        for index, units in enumerate(self.graph.needs(axis)):
            gone = [int(u) for u in units if u >= 0 and not self.mask[u]]
            if len(gone) > 1:
                self.blocked.update(gone)
            if gone:
                found[index] = gone[0]
        return found

    def _step(
        self,
        flat: Flat,
        step: Step,
        record: Record,
        arrays: Mapping[int, Any],
        known: Mapping[int, Known],
    ) -> Known | None:
        name = record.name
        contraction = name in ("dot_general", "conv_general_dilated")
        if contraction and self._consume(flat, step, record, arrays, known):
            return self._produced(step, record, arrays)
        self._block_what_ends_here(record)
        if name in ELEMENTWISE and len(step.results) == 1:
            return _elementwise(step, record, arrays, known)
        return _moved(step, record, known)

    def _block_what_ends_here(self, record: Record) -> None:
        """Blocks the removed channels that the step reads and does not pass on."""
        passed = {
            unit
            for value in record.outputs
            for axis in value.axes
            for unit in self._removed(axis).values()
        }
        for value in record.inputs:
            for axis in value.axes:
                self.blocked |= {*self._removed(axis).values()} - passed

    # Contractions -------------------------------------------------------------

    def _consume(self, flat: Flat, step: Step, record: Record, arrays, known) -> bool:
        """Notes what the outputs are owed; False if it is no layer with a kernel."""
        layer = _Layer.of(record)
        if layer is None:
            return False
        removed = self._removed(record.inputs[layer.data].axes[layer.taken])
        if not removed:
            return True
        have = known.get(step.operands[layer.data])
        weights = np.asarray(arrays[step.operands[layer.kernel]], np.float64)
        weights = np.moveaxis(weights, (layer.contracted, layer.columns), (0, 1))
        matrix = weights.sum(tuple(range(2, weights.ndim)))  # of all taps
        place = self._receiver(flat, step, record, layer.made)
        for index, unit in removed.items():
            if have is None or have.axis != layer.taken or not have.sure[index]:
                self.blocked.add(unit)
                continue
            value = float(have.value[index])
            if value and place is not None and not layer.padded:
                path, sign = place
                self.owed[path].append((unit, sign * value * matrix[index]))
            elif value:
                self.blocked.add(unit)
        return True

    def _receiver(
        self, flat: Flat, step: Step, record: Record, made: int
    ) -> tuple[str, float] | None:
        """The leaf that is added to the result (a bias) or subtracted (a mean), and
        its sign; None if there is none, or something else reads one of the two."""
        result = step.results[0]
        readers = [s for s in flat.steps if result in s.operands]
        if len(readers) != 1 or result in flat.outputs:
            return None
        reader, name = readers[0], readers[0].eqn.primitive.name
        if name not in ("add", "sub") or reader.operands[0] == reader.operands[1]:
            return None
        other = 1 - reader.operands.index(result)
        given = self.graph.records[reader.site].inputs[other]
        if given.source is None or (name == "sub" and other == 0):
            return None
        leaf, axes = self.graph.leaves[given.source].axes, given.axes
        aligned = len(leaf) == 1 and len(axes) == len(record.outputs[0].axes)
        if not aligned or leaf[0] is None or axes[made] is None:
            return None
        if not np.array_equal(np.asarray(axes[made]), np.asarray(leaf[0])):
            return None
        slot = flat.variables[list(self.graph.leaves).index(given.source)]
        if not _read_by_one(flat, slot):
            return None
        return given.source, -1.0 if name == "sub" else 1.0

    def _produced(self, step: Step, record: Record, arrays) -> Known | None:
        """Outputs whose column of the kernel is zero are zero."""
        layer = _Layer.of(record)
        assert layer is not None
        weights = np.asarray(arrays[step.operands[layer.kernel]])
        columns = np.moveaxis(weights, layer.columns, 0)
        zero = np.asarray(~columns.reshape(columns.shape[0], -1).any(1))
        return Known(layer.made, np.zeros(zero.size), zero)


def _read_by_one(flat: Flat, slot: int) -> bool:
    """True if one step reads the array, through casts and reshapes at most."""
    views, readers = {slot}, 0
    for step in flat.steps:
        if not views & {o for o in step.operands if isinstance(o, int)}:
            continue
        if step.pure and step.eqn.primitive.name in VIEWS:
            views.update(step.results)
        else:
            readers += 1
    return readers == 1 and not views & {o for o in flat.outputs if isinstance(o, int)}


@dataclass(frozen=True)
class _Layer:
    """A plain convolution, or a matrix product of one contracted axis.

    Attributes:
      data, kernel: operand numbers.
      taken, contracted: the contracted axis of the data and of the kernel.
      columns, made: the axis of the outputs in the kernel and in the result.
      padded: whether windows see padding, so that borders get less.
    """

    data: int
    taken: int
    kernel: int
    contracted: int
    columns: int
    made: int
    padded: bool

    @classmethod
    def of(cls, record: Record) -> _Layer | None:
        """The layer that the record is; None if it is another contraction."""
        pure = [value.pure for value in record.inputs]
        params, numbers = record.eqn.params, record.eqn.params["dimension_numbers"]
        if sum(pure) != 1:
            return None
        if record.name == "conv_general_dilated":
            grouped = params["feature_group_count"] * params["batch_group_count"] != 1
            if not pure[1] or grouped:
                return None
            padded = any(low or high for low, high in params["padding"])
            padded = padded or any(d != 1 for d in params["lhs_dilation"])
            lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
            return cls(0, lhs[1], 1, rhs[1], rhs[0], out[1], padded)
        contract, batch = numbers
        kernel = pure.index(True)
        data, rank = 1 - kernel, len(record.inputs[kernel].axes)
        if batch[0] or len(contract[0]) != 1 or rank != 2:
            return None
        held = contract[kernel][0]
        made = 0 if kernel == 0 else len(record.inputs[data].axes) - 1
        return cls(data, contract[data][0], kernel, held, 1 - held, made, False)


def _elementwise(step: Step, record: Record, arrays, known) -> Known | None:
    """The operation on the constants; zero times anything is zero."""
    shape = record.eqn.outvars[0].aval.shape
    have = [known.get(o) if isinstance(o, int) else None for o in step.operands]
    axis = next((k.axis for k in have if k is not None), None)
    if axis is None:
        # A zero scale makes a constant of what varies.
        vectors = [
            v for v in record.inputs if v.pure and len(v.axes) == len(shape) and shape
        ]
        if record.name != "mul" or not vectors:
            return None
        axis = max(range(len(shape)), key=lambda d: vectors[0].axes[d] is not None)
    size, given, sure = shape[axis], [], []
    for operand, one, value in zip(step.operands, have, record.inputs, strict=True):
        if one is not None and one.axis == axis and one.value.size == size:
            given.append(one.value)
            sure.append(one.sure)
            continue
        array = None
        if not isinstance(operand, int):
            array = np.asarray(operand[0])
        elif operand in arrays and value.pure:
            array = np.asarray(arrays[operand])
        vector = None if array is None else _vector(array, axis, len(shape), size)
        given.append(np.zeros(size) if vector is None else vector)
        sure.append(np.full(size, vector is not None))
    dtypes = [atom.aval.dtype for atom in record.eqn.invars]
    operands = [jnp.asarray(v, d) for v, d in zip(given, dtypes, strict=True)]
    with np.errstate(all="ignore"):
        result = np.asarray(bind(record.eqn, operands)[0], np.float64)
    whole = np.asarray(np.logical_and.reduce(sure))
    if record.name == "mul":
        zero = np.logical_or.reduce(
            [s & (v == 0) for v, s in zip(given, sure, strict=True)]
        )
        result, whole = np.where(zero, 0.0, result), np.logical_or(whole, zero)
    return Known(axis, result, whole)


def _vector(array: np.ndarray, axis: int, rank: int, size: int) -> np.ndarray | None:
    """The values along one axis of an array that varies along no other; or None."""
    if array.ndim == 0:
        return np.full(size, array)
    if array.ndim != rank:
        return None
    rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
    if (rows != rows[:, :1]).any():
        return None
    return np.broadcast_to(rows[:, 0], (size,)).astype(rows.dtype)


# Windows and reductions over places that leave a constant what it is.
_LAYOUTS = frozenset(("reshape", "transpose", "squeeze", "broadcast_in_dim"))
_SAME = frozenset(
    ("reduce_max", "reduce_min", "reduce_window_max", "reduce_window_min")
)


def _spread(params: Mapping[str, Any]) -> bool:
    """True for windows over an array with holes between its entries."""
    return any(d != 1 for d in params.get("base_dilation") or ())


def _moved(step: Step, record: Record, known: Mapping[int, Known]) -> Known | None:
    """What layouts, windows and reductions over places make of the constants.

    The axis is found again by its nodes: where they are spread (a flatten), every
    index takes its node's value.
    """
    one = known.get(step.operands[0]) if isinstance(step.operands[0], int) else None
    if one is None or len(step.results) != 1:
        return None
    params, name = record.eqn.params, record.name
    shape = record.eqn.invars[0].aval.shape
    factor = 1.0
    if name in ("reduce_sum", "reduce_window_sum"):
        if name == "reduce_sum":
            sizes = [shape[d] for d in params["axes"]]
        else:
            sizes = list(params["window_dimensions"])
            padded = any(low or high for low, high in params["padding"])
            if padded or _spread(params):
                factor = np.nan  # some see fewer: only zero stays what it is
        factor = factor * float(np.prod(sizes))
    elif name not in (*_SAME, *_LAYOUTS) or _spread(params):
        return None
    if name.startswith("reduce_") and one.axis in params.get("axes", ()):
        return None
    before = record.inputs[0].axes[one.axis]
    if before is None or np.unique(before).size < before.size:
        return None  # a channel that is there twice may have two values
    order = np.argsort(before)
    for dim, axis in enumerate(record.outputs[0].axes):
        if axis is None or not np.isin(axis, before).all():
            continue
        index = order[np.searchsorted(before[order], axis)]
        value, sure = one.value[index], one.sure[index]
        if np.isfinite(factor):
            return Known(dim, value * factor, sure)
        return Known(dim, np.zeros(value.size), np.asarray(sure & (value == 0.0)))
    return None

"""Where a group's channels are read: the layers that can be refitted, as matrices.

A tap is a convolution or matrix product whose kernel is a leaf of the variables. It
is seen as Y = X W with rows X (n, R), one an output position, kernel W (R, N) and
targets Y (n, N) before the bias; every row and column knows the channels it needs. A
grouped convolution is several taps, one for each of its blocks of inputs and outputs.
"""

# JAX types `aval` as its base class, which has no shape.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxprune.graph import ChannelGraph, Record, Site
from jaxprune.graph.evaluate import CALLS, sub_jaxprs
from jaxprune.graph.examples import Layout, layouts
from jaxprune.graph.interpret import CASTS, VIEWS
from jaxprune.records import Group
from jaxprune.stats import patches

# Blocks of a grouped convolution that are taps of their own; one with more is left out.
MOST_PARTS = 64


@dataclass(frozen=True, eq=False)
class Tap:
    """One use of a kernel that reads channels, or of one block of it.

    Attributes:
      site: its call site.
      path: the kernel's leaf.
      image, kernel: number of the operand with the activations, and of the kernel.
      order: permutation of the kernel's axes to (contracted ..., made ...).
      contracted: how many of those are contracted.
      shape: the kernel's shape in that order.
      row_needs, column_needs: int arrays (R, F), (N, F): channels, -1 for none.
      intercept: leaf that can take a shift of these outputs, and of no others; or None.
      sign: +1 if the intercept is added to the outputs, -1 if subtracted.
      layout: where the examples lie in the image.
      part, parts: which of how many blocks of the kernel's columns.
    """

    site: Site
    path: str
    image: int
    kernel: int
    order: tuple[int, ...]
    contracted: int
    shape: tuple[int, ...]
    row_needs: np.ndarray
    column_needs: np.ndarray
    intercept: str | None
    sign: int
    layout: Layout
    part: int = 0
    parts: int = 1

    @property
    def name(self) -> str:
        """The kernel's path, and the block if there are several."""
        return self.path if self.parts == 1 else f"{self.path}[{self.part}]"

    @property
    def rows(self) -> int:
        return math.prod(self.shape[: self.contracted])

    @property
    def outputs(self) -> int:
        return math.prod(self.shape[self.contracted :]) // self.parts

    @property
    def columns(self) -> slice:
        """The outputs that it makes, among those of the kernel."""
        return slice(self.part * self.outputs, (self.part + 1) * self.outputs)

    def _whole(self, leaf: Any) -> np.ndarray:
        kernel = np.transpose(np.asarray(leaf, np.float64), self.order)
        return kernel.reshape(self.rows, self.parts * self.outputs)

    def matrix(self, leaf: Any) -> np.ndarray:
        """The kernel leaf, or its block of it, as W (R, N), float64."""
        return self._whole(leaf)[:, self.columns]

    def unmatrix(self, matrix: np.ndarray, leaf: Any) -> jax.Array:
        """The leaf with the matrix in its place."""
        whole = self._whole(leaf).copy()
        whole[:, self.columns] = matrix
        kernel = np.transpose(whole.reshape(self.shape), np.argsort(self.order))
        return jnp.asarray(kernel, leaf.dtype)

    def shifted(self, shift: np.ndarray, leaf: Any, start: Any) -> jax.Array:
        """The leaf `intercept`, its outputs shifted by (N,) from those of `start`."""
        moved = np.array(leaf, np.float64).reshape(-1)
        origin = np.asarray(start, np.float64).reshape(-1)[self.columns]
        moved[self.columns] = origin + self.sign * np.asarray(shift, np.float64)
        return jnp.asarray(moved.reshape(leaf.shape), leaf.dtype)

    def row_channels(self, group: Group) -> np.ndarray:
        """int array (R,): the group's channel that each row belongs to, else -1."""
        return _channels(self.row_needs, group)

    def column_channels(self, group: Group) -> np.ndarray:
        """int array (N,): the group's channel that each column makes, else -1."""
        return _channels(self.column_needs, group)

    def row_keep(self, unit_mask: np.ndarray) -> np.ndarray:
        """bool array (R,): rows all of whose channels are kept."""
        return np.asarray(np.append(unit_mask, True)[self.row_needs].all(axis=1))


def _channels(needs: np.ndarray, group: Group) -> np.ndarray:
    place = np.full(max(needs.max(initial=-1), group.units.max()) + 2, -1, np.int64)
    place[group.units] = np.arange(group.size)
    return place[needs].max(1)


def find_taps(graph: ChannelGraph) -> tuple[Tap, ...]:
    """Every tap of the graph, in the order of execution.

    Kernels that are not leaves themselves (stacked by a scan, normalised by weight
    norm), depthwise convolutions, which read each channel for itself alone, batched
    products, those of complex numbers, and images in which the examples cannot be told
    apart, are left out.
    """
    taps = []
    for site, record in graph.records.items():
        found = _TAPS.get(record.name)
        if found and not jnp.iscomplexobj(record.eqn.outvars[0].aval):
            taps += found(graph, site, record)
    return _with_own_intercepts(graph, taps)


def _with_own_intercepts(graph: ChannelGraph, taps: Sequence[Tap]) -> tuple[Tap, ...]:
    """The taps, without an intercept that the uses of their kernel do not have alone.

    One bias behind two kernels, or one kernel with another norm at each call (heads
    over several maps): no one shift of it suits all.
    """
    reads = Counter(
        value.source
        for record in graph.records.values()
        if record.name not in VIEWS and record.name not in CALLS
        for value in record.inputs
    )
    uses: dict[str, set[tuple[Site, str | None]]] = defaultdict(set)
    for tap in taps:
        uses[tap.path].add((tap.site, tap.intercept))
    shared = {
        path
        for path, found in uses.items()
        if len({name for _, name in found}) > 1
        or any(reads[name] != len(found) for _, name in found if name is not None)
    }
    return tuple(
        replace(tap, intercept=None) if tap.path in shared else tap for tap in taps
    )


def _conv_taps(graph: ChannelGraph, site: Site, record: Record) -> list[Tap]:
    params, kernel = record.eqn.params, record.inputs[1]
    if kernel.leaf is None or record.repeat != 1 or params["batch_group_count"] != 1:
        return []
    parts, spec = params["feature_group_count"], params["dimension_numbers"].rhs_spec
    order = (*spec[2:], spec[1], spec[0])
    tap = _tap(graph, site, record, 0, 1, order, len(order) - 1)
    if tap is None or tap.layout.axis not in (None, params["dimension_numbers"][0][0]):
        return []
    if parts == 1:
        return [tap]
    inputs = record.eqn.invars[1].aval.shape[spec[1]]
    if inputs == 1 or parts > MOST_PARTS:
        return []
    # The rows need what the kernel's own axis does: a place in every block. That a
    # whole block may go too is no matter of its rows, its columns go with it.
    blocks = [replace(tap, part=part, parts=parts) for part in range(parts)]
    return [
        replace(block, column_needs=tap.column_needs[block.columns]) for block in blocks
    ]


def _dot_tap(graph: ChannelGraph, site: Site, record: Record) -> list[Tap]:
    contract, batch = record.eqn.params["dimension_numbers"]
    leaves = [value.leaf is not None for value in record.inputs]
    if any(leaves) == all(leaves) or batch[0] or record.repeat != 1:
        return []
    kernel = leaves.index(True)
    if record.inputs[1 - kernel].pure:
        return []
    rank = len(record.inputs[kernel].axes)
    used = tuple(contract[kernel])
    free = tuple(d for d in range(rank) if d not in used)
    tap = _tap(graph, site, record, 1 - kernel, kernel, (*used, *free), len(used))
    if tap is None or tap.layout.axis in contract[1 - kernel]:
        return []
    return [tap]


def _tap(
    graph: ChannelGraph,
    site: Site,
    record: Record,
    image: int,
    kernel: int,
    order: tuple[int, ...],
    contracted: int,
) -> Tap | None:
    layout = layouts(graph).operands.get(site, {image: None})[image]
    if layout is None:
        return None
    value = record.inputs[kernel]
    shape = record.eqn.invars[kernel].aval.shape
    dims = [(value.axes[d], shape[d]) for d in order]
    assert value.leaf is not None
    intercept, sign = find_intercept(graph, site)
    columns = [size for _, size in dims[contracted:]]
    if intercept is not None:
        leaf = graph.leaves[intercept].axes
        sizes = [1 if a is None else a.size for a in leaf]
        if math.prod(sizes) != math.prod(columns):
            intercept = None
    return Tap(
        site,
        value.leaf,
        image,
        kernel,
        order,
        contracted,
        tuple(size for _, size in dims),
        _grid_needs(graph, dims[:contracted]),
        _grid_needs(graph, dims[contracted:]),
        intercept,
        sign,
        layout,
    )


_TAPS = {"dot_general": _dot_tap, "conv_general_dilated": _conv_taps}


def _grid_needs(graph: ChannelGraph, dims: Sequence[tuple[Any, int]]) -> np.ndarray:
    """Channels that each cell of the flattened axes needs, (cells, F)."""
    sizes = [size for _, size in dims]
    cells = math.prod(sizes)
    found = []
    for place, (axis, size) in enumerate(dims):
        if axis is None:
            continue
        needs = graph.needs(axis)
        number = np.arange(cells) // math.prod(sizes[place + 1 :]) % size
        found.append(needs[number])
    return np.concatenate(found, 1) if found else np.full((cells, 1), -1, np.int64)


# Intercepts -------------------------------------------------------------------


def find_intercept(graph: ChannelGraph, site: Site) -> tuple[str | None, int]:
    """The leaf that is added to (+1) or subtracted from (-1) the outputs right away.

    A bias, or the running mean of a BatchNorm: both can take a constant shift.
    """
    for place, mine in sole_users(graph, site):
        record = graph.records[place]
        if record.name in CASTS:
            continue
        if record.name in ("add", "add_any"):
            return record.inputs[1 - mine].source, 1
        if record.name == "sub" and mine == 0:
            return record.inputs[1].source, -1
        break
    return None, 1


def sole_users(graph: ChannelGraph, site: Site) -> Iterator[tuple[Site, int]]:
    """The only user of a result, the only user of that one's, and so on.

    Yields (site, which operand of it the result is); ends where a result is read twice,
    returned, or not read.
    """
    jaxpr = graph.closed.jaxpr
    for number in site[:-1]:
        inner = sub_jaxprs(jaxpr.eqns[number])
        if len(inner) != 1:
            return
        jaxpr = inner[0].jaxpr
    number = site[-1]
    while True:
        var = jaxpr.eqns[number].outvars[0]
        uses = [
            (k, place)
            for k in range(number + 1, len(jaxpr.eqns))
            for place, atom in enumerate(jaxpr.eqns[k].invars)
            if atom is var
        ]
        returned = any(atom is var for atom in jaxpr.outvars)
        if len(uses) != 1 or returned:
            return
        ((number, place),) = uses
        here = (*site[:-1], number)
        if here not in graph.records:
            return
        yield here, place


# Rows and targets -------------------------------------------------------------


def rows_and_targets(
    tap: Tap,
    eqn: jex.JaxprEqn,
    image: jax.Array,
    target: jax.Array,
    chosen: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """X (B, P, parts, R) and Y (B, P, parts, N) at some positions of every example.

    Of all blocks of the tap's kernel, one for most.

    Args:
      image: the operand that the kernel reads, in the current network.
      target: the result of the equation in the original network.
      chosen: int (B, P, nd), or (P, nd) for all, on the `output_map` of an example.
    """
    if eqn.primitive.name == "conv_general_dilated":
        return _conv_rows(tap, eqn, image, target, chosen)
    contract = eqn.params["dimension_numbers"][0][tap.image]
    free = [d for d in range(image.ndim) if d not in contract]
    layout = tap.layout.moved((*free, *contract))
    x = layout.first(jnp.transpose(image, (*free, *contract)))
    if tap.image == 1:  # the kernel's axes come first in the result
        made = target.ndim - len(free)
        target = jnp.moveaxis(target, range(made), range(-made, 0))
    x = x.reshape(len(x), -1, 1, tap.rows)
    y = layout.first(target).reshape(len(x), -1, 1, tap.outputs)
    if chosen.ndim == 2:  # all
        return x, y
    chosen = chosen[:, :, :1, None]
    return jnp.take_along_axis(x, chosen, 1), jnp.take_along_axis(y, chosen, 1)


def output_map(tap: Tap, eqn: jex.JaxprEqn) -> tuple[int, ...]:
    """The sizes of the map on which an example's outputs lie."""
    if eqn.primitive.name == "conv_general_dilated":
        spec = eqn.params["dimension_numbers"].out_spec
        sizes = tuple(eqn.outvars[0].aval.shape[d] for d in spec[1:])
        beside = _beside(tap.layout, eqn.outvars[0].aval.shape[spec[0]])
        return (*beside, *sizes[1:])
    contract = eqn.params["dimension_numbers"][0][tap.image]
    shape = eqn.invars[tap.image].aval.shape
    rows = math.prod(size for d, size in enumerate(shape) if d not in contract)
    return (rows if tap.layout.axis is None else rows // tap.layout.size,)


def _beside(layout: Layout, rows: int) -> tuple[int, ...]:
    """The axis that `Layout.first` adds to a map of so many rows, if any."""
    each = rows if layout.axis is None else layout.merged
    return (each,) if layout.axis is None or each > 1 else ()


def _conv_rows(tap: Tap, eqn, image, target, chosen):
    params = eqn.params
    numbers = params["dimension_numbers"]
    lhs, out = numbers.lhs_spec, numbers.out_spec
    layout = tap.layout.moved((lhs[0], *lhs[2:], lhs[1]))
    image = layout.first(jnp.transpose(image, (lhs[0], *lhs[2:], lhs[1])))
    target = layout.first(jnp.transpose(target, (out[0], *out[2:], out[1])))
    rhs = eqn.invars[1].aval.shape
    # What the examples are merged with is one more axis of the map, with a window of 1.
    one = (1,) * (image.ndim - len(lhs))
    x = patches.gather_patches(
        image,
        chosen,
        window=(*one, *(rhs[d] for d in numbers.rhs_spec[2:])),
        strides=(*one, *params["window_strides"]),
        padding=(*((0, 0) for _ in one), *params["padding"]),
        rhs_dilation=(*one, *params["rhs_dilation"]),
        lhs_dilation=(*one, *params["lhs_dilation"]),
    )
    y = patches.gather_positions(target, chosen)
    # The channels of a patch are its last axis: block after block.
    inputs = image.shape[-1] // tap.parts
    x = x.reshape(*x.shape[:-1], -1, tap.parts, inputs)
    x = jnp.moveaxis(x, -2, -3)
    batch = image.shape[0]
    return (
        x.reshape(batch, -1, tap.parts, tap.rows),
        y.reshape(batch, -1, tap.parts, tap.outputs),
    )


def by_kernel(taps: Sequence[Tap]) -> Mapping[str, tuple[Tap, ...]]:
    """{tap's name: its uses}: one, or several of a layer that is called twice."""
    found: dict[str, tuple[Tap, ...]] = {}
    for tap in taps:
        found[tap.name] = (*found.get(tap.name, ()), tap)
    return found

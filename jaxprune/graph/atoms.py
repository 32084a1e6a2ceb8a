"""The node table of a trace: one node per index of each tracked axis.

Rules allocate nodes, tie them (`unite`), pin them (`freeze`) and combine them where
a reshape merges or splits axes (`merge`, `split`). A merged index p_ij is a PRODUCT
node: it is kept if and only if both of its factors are. `solve` turns the ties into
classes; a class is a leaf (a channel) or a product of leaves.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

# An axis is a vector of node ids, or None: not tracked, it freezes what it meets.
Axis = np.ndarray | None


@dataclass(eq=False)
class Atoms:
    """Nodes, ties, pins and products of one trace; filled by the rules.

    Attributes:
      idle: what nothing reads is followed: a rule's pin has no say, but shapes must
        still agree where a smaller program computes it.
    """

    count: int = 0
    idle: bool = False
    ties: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    pins: list[tuple[np.ndarray, str]] = field(default_factory=list)
    # Products, by rows: node, first factor, second factor, inner size, block.
    _products: list[np.ndarray] = field(default_factory=list)
    _merged: dict[tuple[bytes, bytes], np.ndarray] = field(default_factory=dict)
    _factors: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    blocks: int = 0

    def fresh(self, size: int) -> np.ndarray:
        """`size` new nodes."""
        ids = np.arange(self.count, self.count + size)
        self.count += size
        return ids

    def unite(self, a: Axis, b: Axis, why: str) -> Axis:
        """Ties two axes index by index; an untracked one freezes the other."""
        if a is None or b is None:
            self._pin(a, why)
            self._pin(b, why)
            return None
        if a is not b and not np.array_equal(a, b):
            self.ties.append((a, b))
        return a

    def freeze(self, axis: Axis, why: str) -> None:
        """Pins every index of the axis, with the reason that users will read."""
        if not self.idle:
            self._pin(axis, why)

    def _pin(self, axis: Axis, why: str) -> None:
        if axis is not None and axis.size:
            self.pins.append((axis, why))

    # Products ---------------------------------------------------------------

    def merge(self, axes: Sequence[tuple[Axis, int]]) -> Axis:
        """The axis that a reshape makes of several (axis, size), row-major."""
        axes = [(axis, size) for axis, size in axes if size != 1]
        parts: list[tuple[Axis, int]] = []
        for axis, size in axes:
            grid = None if axis is None else self._grid(axis)
            parts += [(axis, size)] if grid is None else [(f, f.size) for f in grid]
        if not parts:
            return None
        merged, size = parts[-1]
        for axis, outer in reversed(parts[:-1]):
            merged = self._pair(axis, outer, merged, size)
            size *= outer
        return merged

    def split(self, axis: Axis, sizes: Sequence[int]) -> list[Axis]:
        """The axes of `sizes` that a reshape makes of one axis, row-major."""
        real = [size for size in sizes if size != 1]
        parts = [None] * len(real) if axis is None else self._split(axis, real)
        found = iter(parts)
        return [None if size == 1 else next(found) for size in sizes]

    def _split(self, axis: np.ndarray, sizes: list[int]) -> list[Axis]:
        if len(sizes) <= 1:
            whole: list[Axis] = [axis]
            return whole[: len(sizes)]
        outer, inner = sizes[0], axis.size // sizes[0]
        table = axis.reshape(outer, inner)
        if (table == table[:1]).all():
            return [None, *self._split(table[0], sizes[1:])]
        if (table == table[:, :1]).all():
            return [table[:, 0], *[None] * (len(sizes) - 1)]
        grid = self._grid(axis)
        if grid is not None:
            grid, cut = self._cut(grid, outer)
            if cut:
                head = self.merge([(f, f.size) for f in grid[:cut]])
                tail = self.merge([(f, f.size) for f in grid[cut:]])
                assert tail is not None
                return [head, *self._split(tail, sizes[1:])]
        head, tail = self.fresh(outer), self.fresh(inner)
        self.ties.append((self._product(head, tail), axis))
        return [head, *self._split(tail, sizes[1:])]

    def _cut(self, grid: list[np.ndarray], outer: int) -> tuple[list[np.ndarray], int]:
        """How many factors of the grid make an outer axis of that size, or 0.

        The factor in which the cut falls is split in two (the channels of a feature
        group, between two grouped convolutions with a channel shuffle).
        """
        lengths = [factor.size for factor in grid]
        for cut in range(1, len(grid)):
            if math.prod(lengths[:cut]) == outer:
                return grid, cut
        before = next(
            k for k in range(len(grid)) if math.prod(lengths[: k + 1]) > outer
        )
        done = math.prod(lengths[:before])
        if outer % done or lengths[before] % (outer // done):
            return grid, 0
        parts = self._split(
            grid[before], [outer // done, lengths[before] * done // outer]
        )
        found = [part for part in parts if part is not None]
        if len(found) < len(parts):
            return grid, 0
        return [*grid[:before], *found, *grid[before + 1 :]], before + 1

    def _pair(self, outer: Axis, outer_size: int, inner: Axis, inner_size: int) -> Axis:
        if outer is None:
            return None if inner is None else np.tile(np.asarray(inner), outer_size)
        if inner is None:
            return np.repeat(outer, inner_size)
        return self._product(outer, inner)

    def _product(self, outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
        key = (outer.tobytes(), inner.tobytes())
        if key not in self._merged:
            nodes = self.fresh(outer.size * inner.size)
            first, second = np.repeat(outer, inner.size), np.tile(inner, outer.size)
            rows = np.stack(
                [
                    nodes,
                    first,
                    second,
                    np.full(nodes.size, inner.size),
                    np.full(nodes.size, self.blocks),
                ]
            )
            self._products.append(rows)
            self._merged[key] = nodes
            for node in nodes[:: inner.size]:
                self._factors[int(node)] = (self.blocks, inner.size, int(nodes[0]))
            self.blocks += 1
        return self._merged[key]

    def _grid(self, axis: np.ndarray) -> list[np.ndarray] | None:
        """The factor vectors of an axis that is a whole product, outermost first."""
        known = self._factors.get(int(axis[0]))
        if known is None or axis.size % known[1]:
            return None
        block, inner = known[0], known[1]
        rows = self._products[block]
        offset = axis - known[2]
        if (offset < 0).any() or (offset >= rows.shape[1]).any():
            return None
        first = rows[1][offset].reshape(-1, inner)
        second = rows[2][offset].reshape(-1, inner)
        if (first != first[:, :1]).any() or (second != second[:1]).any():
            return None
        deeper = self._grid(second[0])
        return [first[:, 0], *([second[0]] if deeper is None else deeper)]

    @property
    def products(self) -> np.ndarray:
        """int array (5, P): node, first factor, second factor, inner size, block."""
        if not self._products:
            return np.zeros((5, 0), np.int64)
        return np.concatenate(self._products, axis=1)

    def solve(self) -> Classes:
        """The classes that follow from all ties, pins and products."""
        ties = list(self.ties)
        pinned = np.zeros(self.count, bool)
        for axis, _ in self.pins:
            pinned[axis] = True
        products, state = self.products, None
        while True:
            label, frozen = self._settle(ties, pinned, products)
            classes = Classes(label, frozen, products)
            progress = (label.max(initial=-1), int(frozen.sum()))
            if progress == state or not products.size:
                return classes
            state = progress
            self._agree(classes, ties, pinned)

    def _settle(
        self,
        ties: list[tuple[np.ndarray, np.ndarray]],
        pinned: np.ndarray,
        products: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Classes after all that pins say of products; adds to ties and pins."""
        node, first, second = products[:3]
        state = None
        while True:
            label, frozen = _components(self.count, ties, pinned)
            progress = (label.max(initial=-1), int(frozen.sum()))
            if progress == state or not node.size:
                return label, frozen
            state = progress
            of, of_first, of_second = label[node], label[first], label[second]
            pin = [
                first[frozen[of]],
                second[frozen[of]],
                second[of == of_first],
                first[of == of_second],
                node[frozen[of_first] & frozen[of_second]],
            ]
            ties.append((node[frozen[of_first]], second[frozen[of_first]]))
            ties.append((node[frozen[of_second]], first[frozen[of_second]]))
            pinned[np.concatenate(pin)] = True

    @staticmethod
    def _agree(
        classes: Classes,
        ties: list[tuple[np.ndarray, np.ndarray]],
        pinned: np.ndarray,
    ) -> None:
        """Reconciles true products that share a class; adds to ties and pins.

        Products of the same inner size have the same factors; where the inner
        sizes differ, only whole rows of each can go. A class that is a factor of
        itself through others is pinned.
        """
        node, first, second, inner, _ = classes.products[:, classes.true_products()]
        of = classes.label[node]
        order = np.lexsort((inner, of))
        left, right = order[:-1], order[1:]
        same = of[left] == of[right]
        left, right = left[same], right[same]
        alike = inner[left] == inner[right]
        ties.append((first[left[alike]], first[right[alike]]))
        ties.append((second[left[alike]], second[right[alike]]))
        mixed = np.isin(of, of[left[~alike]])
        pinned[second[mixed]] = True
        count = classes.frozen.size
        edges = (
            np.ones(2 * of.size, bool),
            (np.tile(of, 2), classes.label[np.concatenate([first, second])]),
        )
        graph = sparse.coo_matrix(edges, shape=(count, count))
        _, ring = csgraph.connected_components(graph, connection="strong")
        pinned[node[np.bincount(ring)[ring[of]] > 1]] = True


def _components(
    count: int, ties: list[tuple[np.ndarray, np.ndarray]], pinned: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Class of each node (N,) and, per class, whether a pin holds it."""
    a = np.concatenate([tie[0] for tie in ties] or [np.zeros(0, np.int64)])
    b = np.concatenate([tie[1] for tie in ties] or [np.zeros(0, np.int64)])
    links = sparse.coo_matrix((np.ones(a.size, bool), (a, b)), shape=(count, count))
    number, label = csgraph.connected_components(links, directed=False)
    frozen = np.zeros(number, bool)
    frozen[label[pinned]] = True
    return label.astype(np.int64), frozen


@dataclass(eq=False)
class Classes:
    """Which nodes go together.

    Attributes:
      label: int array (nodes,), the class of each node.
      frozen: bool array (classes,), True where a pin holds the class.
      products: as `Atoms.products`.
    """

    label: np.ndarray
    frozen: np.ndarray
    products: np.ndarray

    def true_products(self) -> np.ndarray:
        """bool array (P,): products that need both of their factors."""
        node, first, second = self.label[self.products[:3]]
        return ~self.frozen[node] & (node != first) & (node != second)

    @cached_property
    def table(self) -> np.ndarray:
        """int array (classes, F): the unfrozen leaf classes (channels) that each class
        needs, ascending, padded with -1."""
        count = self.frozen.size
        node, first, second = self.label[self.products[:3, self.true_products()]]
        free = np.where(self.frozen, -1, np.arange(count))
        factors = np.full((count + 1, 2), -1, np.int64)
        factors[node, 0], factors[node, 1] = free[first], free[second]
        splits = np.zeros(count + 1, bool)  # the last stands for the pad
        splits[node] = True
        table = free[:, None]
        while True:
            rows = splits[table].any(1)
            if not rows.any():
                return table
            old = table[rows]
            whole = np.where(splits[old], -1, old)
            parts = factors[np.where(splits[old], old, count)]
            wide = _tidy(np.concatenate([whole, *np.moveaxis(parts, -1, 0)], axis=1))
            grown = np.full((count, max(wide.shape[1], table.shape[1])), -1, np.int64)
            grown[:, : table.shape[1]] = table
            grown[rows] = -1
            grown[rows, : wide.shape[1]] = wide
            table = grown

    def needs(self, axis: np.ndarray) -> np.ndarray:
        """int array (n, F): leaf classes that each index needs, padded with -1."""
        found = self.table[self.label[axis]]
        width = max(int((found >= 0).sum(1).max(initial=0)), 1)
        return found[:, :width]


def _tidy(rows: np.ndarray) -> np.ndarray:
    """Every row ascending, without repeats, the pad (-1) behind; no empty columns."""
    last = np.iinfo(np.int64).max
    rows = np.sort(np.where(rows < 0, last, rows), axis=1)
    rows[:, 1:][rows[:, 1:] == rows[:, :-1]] = last
    rows = np.sort(rows, axis=1)
    rows[rows == last] = -1
    return rows[:, : max(int((rows >= 0).sum(1).max(initial=0)), 1)]

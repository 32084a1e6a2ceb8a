"""MACs, parameters and bytes under any plan, from the records of the trace."""

# JAX types `aval` as its base class, which has no shape.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import sparse

from jaxprune.graph.atoms import Axis
from jaxprune.graph.interpret import Record
from jaxprune.graph.rules.contraction import product_dims

Needs = Callable[[np.ndarray], np.ndarray]


@dataclass(eq=False)
class Counter:
    """Kept sizes of many axes at once, and sums of products of them.

    One row an axis: kept = constant + matrix @ keep for axes whose indices need at
    most one channel; axes with product indices are counted one by one.
    """

    matrix: Any  # scipy.sparse, (axes, channels)
    constant: np.ndarray
    products: dict[int, np.ndarray]

    def sizes(self, keep: np.ndarray) -> np.ndarray:
        """int array (axes + 1,): kept size of each axis; the last is 1."""
        kept = self.constant + self.matrix @ keep.astype(np.int64)
        extended = np.append(keep, True)
        for row, needs in self.products.items():
            kept[row] = extended[needs].all(1).sum()
        return np.append(kept, 1)


@dataclass(eq=False)
class Terms:
    """A cost as a sum over terms: coefficient times a product of kept sizes."""

    coefficient: list[float]
    axes: list[list[int]]

    def total(self, sizes: np.ndarray) -> float:
        if not self.axes:
            return 0.0
        width = max(len(row) for row in self.axes) or 1
        index = np.array([row + [-1] * (width - len(row)) for row in self.axes])
        return float(np.asarray(self.coefficient) @ sizes[index].prod(1, dtype=float))


class Ledger:
    """Registers the axes that costs depend on, each once."""

    def __init__(self, needs: Needs, units: int):
        self._needs, self._units = needs, units
        self._rows: dict[bytes, int] = {}
        self._tables: list[np.ndarray] = []

    def term(self, dims: Sequence[tuple[Axis, int]]) -> tuple[float, list[int]]:
        """Constant factor and rows of the axes that can shrink."""
        constant, rows = 1.0, []
        for axis, size in dims:
            needs = None if axis is None else self._needs(axis)
            if needs is None or (needs < 0).all():
                constant *= size
                continue
            key = needs.tobytes() + bytes([needs.shape[1]])
            if key not in self._rows:
                self._rows[key] = len(self._tables)
                self._tables.append(needs)
            rows.append(self._rows[key])
        return constant, rows

    def counter(self) -> Counter:
        constant = np.zeros(len(self._tables), np.int64)
        products, ones, units = {}, [], []
        for row, needs in enumerate(self._tables):
            if needs.shape[1] == 1:
                own = needs[needs >= 0]
                constant[row] = needs.size - own.size
                ones.append(np.full(own.size, row))
                units.append(own)
            else:
                products[row] = needs
        rows = np.concatenate(ones or [np.zeros(0, int)])
        columns = np.concatenate(units or [np.zeros(0, int)])
        matrix = sparse.coo_array(
            (np.ones(rows.size, np.int64), (rows, columns)),
            shape=(len(self._tables), max(self._units, 1)),
        )
        return Counter(matrix.tocsr(), constant, products)


def contraction_dims(record: Record) -> list[tuple[Axis, int]] | None:
    """The (axis, size) whose product is the number of MACs, or None for other ops.

    A convolution counts every kernel tap at every output position, padding
    included, as published counts do.
    """
    shapes = [var.aval.shape for var in record.eqn.invars]
    if record.name in ("dot_general", "ragged_dot_general"):
        # In a ragged product every row meets one of the matrices.
        contract, batch, groups = product_dims(record.eqn)
        left, right = (
            list(zip(value.axes, shape, strict=True))
            for value, shape in zip(record.inputs[:2], shapes[:2], strict=True)
        )
        shared = {*contract[1], *batch[1], *groups}
        return left + [dim for d, dim in enumerate(right) if d not in shared]
    if record.name == "conv_general_dilated":
        numbers = record.eqn.params["dimension_numbers"]
        out, kernel = record.outputs[0], record.inputs[1]
        shape = record.eqn.outvars[0].aval.shape
        dims = [
            (axis if d == numbers.out_spec[1] else None, shape[d])
            for d, axis in enumerate(out.axes)
        ]
        taps = math.prod(shapes[1][d] for d in numbers.rhs_spec[2:])
        inputs = numbers.rhs_spec[1]
        return [*dims, (None, taps), (kernel.axes[inputs], shapes[1][inputs])]
    return None

"""The C x C quadratic form that channel gates see, from a layer's second moments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import linalg, sparse

from jaxprune.errors import ScoreError
from jaxprune.stats.moments import Moments, input_covariances, target_covariances

# Rows of the Gram matrix that are made at a time.
BLOCK = 256


class GateSystem(NamedTuple):
    """Reconstruction error as a function of the gates b (C,), all float64.

        error(b) = 1/2 b^T gram b - linear^T b + 1/2 constant

    Attributes:
      gram: (C, C), positive semidefinite.
      linear: (C,).
      constant: what is to be reconstructed: the (weighted) energy of the target.
    """

    gram: np.ndarray
    linear: np.ndarray
    constant: float

    def error(self, gates: np.ndarray) -> float:
        """Relative squared reconstruction error at these gates: 1 at best nothing."""
        b = np.asarray(gates, np.float64)
        energy = b @ self.gram @ b - 2 * self.linear @ b + self.constant
        return float(max(energy, 0.0) / max(self.constant, 1e-300))


def gate_system(
    moments: Moments,
    kernel,
    row_channel,
    *,
    channels: int,
    output_weight=None,
    centred: bool = True,
) -> GateSystem:
    """The gate system of one consumer: Y ~ sum_c b_c X_c W_c, over n samples.

        gram_cd  = 1/n sum_{r in c, s in d} (X^T X)_rs (W diag(s^2) W^T)_rs
        linear_c = 1/n sum_{r in c} <W_r, s^2 (X^T Y)_r> - (same with present rows)
        constant = 1/n || s * (Y - X_present W_present) ||^2

    He et al. 2017 (arXiv:1707.06168) stack X_c W_c of all samples into an (n N, C)
    matrix; this is that matrix's Gram, without the matrix.

    Args:
      moments: of the rows X (n, R) and the targets Y (n, N).
      kernel: W (R, N), rows in the order of X.
      row_channel: int (R,): the channel of each row; -1 for rows that are always
        present and whose part is subtracted from Y.
      channels: C.
      output_weight: s (N,), default 1.
      centred: means removed first: the consumer has an intercept to absorb them.

    Raises:
      ScoreError: shapes that do not fit the moments.
    """
    kernel = np.asarray(kernel, np.float64)
    row_channel = np.asarray(row_channel)
    rows, outputs = np.shape(moments.xy)
    if kernel.shape != (rows, outputs) or row_channel.shape != (rows,):
        raise ScoreError(
            f"moments of {rows} rows and {outputs} outputs need a kernel "
            f"({rows}, {outputs}) and a channel for each row; found {kernel.shape} "
            f"and {row_channel.shape}"
        )
    weight = np.ones(outputs) if output_weight is None else np.square(output_weight)
    # The present rows are one more channel, the last, whose gate is 1.
    channel = np.where(row_channel < 0, channels, row_channel)
    spread = sparse.csr_array(
        (np.ones(rows), (channel, np.arange(rows))), (channels + 1, rows)
    )
    weighted = kernel * weight
    cross, energy = target_covariances(moments, centred=centred)
    # Symmetric: the blocks on the diagonal and right of it say all, a block at a time.
    half = np.zeros((channels + 1, rows))
    for start in range(0, rows, BLOCK):
        block, right = slice(start, start + BLOCK), slice(start, None)
        part = _product(weighted[block], kernel[right])
        part *= input_covariances(moments, block, right, centred=centred)
        part[:, : len(part)] /= 2
        half[:, right] += spread[:, block] @ part
    full = spread @ half.T
    full = full + full.T
    linear = spread @ (cross * weighted).sum(1)
    constant = float(weight @ energy) - 2 * linear[-1] + full[-1, -1]
    gram = full[:-1, :-1]
    return GateSystem(gram, linear[:-1] - full[:-1, -1], max(float(constant), 0.0))


def _product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a b^T of float64 arrays in C order.

    In the BLAS that the refit's LAPACK calls: NumPy has one of its own, whose threads
    go on spinning for tens of milliseconds and take the cores from this one's. Layer
    after layer, selection and refit by the two take twice as long on 2 cores.
    """
    (gemm,) = linalg.get_blas_funcs(("gemm",), (a, b))
    return gemm(1.0, b.T, a.T, trans_a=True).T


def combine(systems: Sequence[GateSystem], *, balance: bool = True) -> GateSystem:
    """The sum of several consumers' systems, which share the gates.

    Args:
      balance: divide each by its constant first, so that a consumer counts by the
        share of its target that is lost and not by the scale of its features, which
        a following normalisation removes anyway.
    """
    shares = [1 / s.constant if balance and s.constant > 0 else 1.0 for s in systems]
    return GateSystem(
        np.sum([s.gram * a for s, a in zip(systems, shares, strict=True)], axis=0),
        np.sum([s.linear * a for s, a in zip(systems, shares, strict=True)], axis=0),
        float(sum(s.constant * a for s, a in zip(systems, shares, strict=True))),
    )

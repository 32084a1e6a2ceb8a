"""Least-squares refit of a consumer's kernel on the rows that are kept."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import linalg

from jaxprune.errors import ScoreError
from jaxprune.stats.moments import Covariances, Moments, covariances

# Moments come from float32 products: what is below this share of a row's energy is
# rounding, and a smaller ridge would fit it.
NOISE = 1e-7
# A row counts for the mean with at most so many times the median energy, and its ridge
# is at most so many times what its own energy asks for: a few loud channels switch the
# refit of the others off otherwise, or single weak ones are never refitted.
LOUD = 100.0


class Refit(NamedTuple):
    """The refitted consumer.

    Attributes:
      kernel: (R, N) float32, zero in removed rows.
      intercept: (N,) float32, zeros without one.
      residual: (N,) float64, mean squared error on the calibration data over the
        variance of the target (over its mean square without an intercept); 0 for a
        constant target.
    """

    kernel: np.ndarray
    intercept: np.ndarray
    residual: np.ndarray


def default_ridge(count: float, rows: int) -> float:
    """The ridge factor for `count` samples and `rows` kept rows: rows / (2 count).

    Clipped to [1e-6, 0.5]. Sampling makes the directions of the Gram matrix uncertain
    by about rows / count of the mean diagonal; with the ridge pulling towards the
    original weights, what the data cannot tell stays as it was. Held-out error at
    half the channels of three convolutions of a CIFAR-10 VGG-16, of factors 1e-6 to 1:
    least within a factor of 3 of this rule for 200, 1,000 and 10,000 patches (1152
    rows, 1,000 patches: 0.05 of the target's energy, against 0.22 at 1e-4).
    """
    return float(np.clip(0.5 * rows / max(count, 1.0), 1e-6, 0.5))


def row_ridge(energies: np.ndarray, ridge: float) -> np.ndarray:
    """r (R,) float64, the ridge of each row.

        r_i = max(ridge min(s, LOUD a_i), NOISE a_i),   s = mean_j min(a_j, LOUD median a)

    energies: a (R,), the diagonal of A. Rows with less than NOISE s, constants but for
      rounding, get the whole of s: they stay at the prior.
    """
    alive = energies > 0
    if not alive.any():
        return np.ones(energies.size)
    scale = np.minimum(energies, LOUD * np.median(energies[alive])).mean()
    capped = np.where(energies > NOISE * scale, LOUD * energies, np.inf)
    added = ridge * np.minimum(scale, capped)
    return np.maximum(added, NOISE * np.maximum(energies, scale * (capped == np.inf)))


def finite_covariances(
    moments: Moments, *, centred: bool, rows: np.ndarray | None = None
) -> Covariances:
    """`covariances`, checked. Raises ScoreError for NaN or infinity in them."""
    cov = covariances(moments, centred=centred, rows=rows)
    if not (np.isfinite(cov.xx).all() and np.isfinite(cov.xy).all()):
        raise ScoreError(
            "the moments hold NaN or infinity: the calibration activations overflowed; "
            "check the weights and the inputs, or run the model in float32"
        )
    return cov


def refit(
    moments: Moments,
    row_keep,
    *,
    kernel=None,
    ridge: float | None = None,
    intercept: bool = True,
) -> Refit:
    """The kernel on the kept rows that best reproduces Y, in closed form.

        (A + diag(r)) W = B + diag(r) W0,  A = X^T X / n,  B = X^T Y / n  (centred)
        intercept = mean(Y) - mean(X) W,    r = ridge * mean diagonal of A

    (see `row_ridge` for channels that are louder or weaker than others by far)

    on the kept rows K of the moments, by one Cholesky factorisation in float64: it
    costs |K|^3 / 3 on the host, 8 times less at half width than the masked R x R
    system that a static shape would need, and nothing is compiled. Output weights
    do not matter here: each column has its own solution.

    Args:
      row_keep: bool (R,).
      kernel: W0 (R, N), the original weights, as the prior of the ridge; without
        it the ridge pulls to zero. Rows without energy stay at the prior.
      ridge: default `default_ridge(count, |K|)`. At least 1e-7, the rounding of
        float32 moments; raised tenfold while the factorisation fails.

    Raises:
      ScoreError: shapes that do not fit, or NaN in the moments.
    """
    rows, outputs = np.shape(moments.xy)
    row_keep = np.asarray(row_keep, bool)
    prior = np.zeros((rows, outputs)) if kernel is None else np.asarray(kernel, "f8")
    if row_keep.shape != (rows,) or prior.shape != (rows, outputs):
        raise ScoreError(
            f"moments of {rows} rows and {outputs} outputs need row_keep ({rows},) and "
            f"a kernel ({rows}, {outputs}); found {row_keep.shape} and {prior.shape}"
        )
    kept = np.flatnonzero(row_keep)
    cov = finite_covariances(moments, centred=intercept, rows=kept)
    if ridge is None:
        ridge = default_ridge(cov.count, kept.size)
    solved, product = _solve(cov.xx, cov.xy, prior[kept], ridge)
    new = np.zeros((rows, outputs))
    new[kept] = solved
    return Refit(
        new.astype(np.float32),
        (cov.mean_y - cov.mean_x @ solved).astype(np.float32),
        _residual(cov, product, solved),
    )


def relative_residual(moments: Moments, kernel, *, intercept: bool = True):
    """(N,) float64: as Refit.residual, of any kernel (R, N) with the best intercept."""
    cov, kernel = covariances(moments, centred=intercept), np.asarray(kernel, "f8")
    return _residual(cov, cov.xx @ kernel, kernel)


def _residual(cov: Covariances, product, kernel) -> np.ndarray:
    """product: A W, of the kernel W."""
    error = cov.yy + (kernel * (product - 2 * cov.xy)).sum(0)
    # A constant target varies by float32 rounding of its mean only.
    varies = cov.yy > np.maximum((1e-6 * cov.mean_y) ** 2, 1e-30)
    scale = np.where(varies, cov.yy, 1.0)
    return np.where(varies, np.maximum(error, 0.0) / scale, 0.0)


def _solve(gram, cross, prior, ridge: float) -> tuple[np.ndarray, np.ndarray]:
    """W and A W, which the equations give without a product."""
    if not len(gram):
        return prior, prior
    if not np.any(np.diagonal(gram) > 0):  # dead inputs say nothing of their weights
        return prior, np.zeros_like(prior)
    added = row_ridge(np.diagonal(gram), ridge)
    while True:
        shifted = gram.T.copy(order="F")  # LAPACK's order: factored in place
        np.fill_diagonal(shifted, np.diagonal(gram) + added)
        try:
            factor = linalg.cho_factor(
                shifted, lower=True, overwrite_a=True, check_finite=False
            )
        except linalg.LinAlgError:
            added = added * 10
            continue
        pull = added[:, None] * prior
        solved = linalg.cho_solve(factor, cross + pull, check_finite=False)
        return solved, cross + pull - added[:, None] * solved

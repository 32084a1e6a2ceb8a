"""Backward elimination: which channel is missed least once the others are refitted.

LASSO with W fixed cannot see that after the refit one channel can stand for another.
Here the refit is part of the choice: with all rows present the least-squares kernel of
a consumer is W = H^-1 (B + r W0), H = A + r, and taking channel c out and refitting
the rest raises its error by

    tr( S W_c^T [(H^-1)_cc]^-1 W_c S )  -  tr( S W0_c^T r_c W0_c S )

with W_c its rows, S = diag(s) the output weights and W0 the prior of the ridge r (a
diagonal, `refit.row_ridge`), which the refit no longer pays for rows that are gone. The
channel of the least rise goes, H^-1 and W are updated for the rest by block elimination,
and so on: Optimal Brain Surgeon (Hassibi and Stork 1993) with channels for weights, as
in ZipLM (Kurtic, Frantar, Alistarh 2023, arXiv:2302.04089, equation 3). The errors are
those of `refit`: its moments, its ridge, its intercept.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import linalg

from jaxprune.errors import ScoreError
from jaxprune.solver.cpli import scaled_scores
from jaxprune.solver.refit import default_ridge, finite_covariances, row_ridge
from jaxprune.stats.moments import Moments

# Channels that are taken out before the inverse is brought up to date.
BATCH = 16
# A variance that float32 sums may give a constant, relative to its mean square.
STILL = 1e-6
Term = tuple[Moments, np.ndarray, np.ndarray, np.ndarray | None]


def elimination_order(
    terms: Sequence[Term],
    channels: int,
    lowest: int,
    *,
    loss_scores=None,
    mu: float = 0.0,
    ridge: float | None = None,
    centred: Sequence[bool] | None = None,
) -> np.ndarray:
    """int64 (channels - lowest,): the channels in the order in which they go.

    The choice of `keep` channels is what its first channels - keep leave. Consumers
    count by the share of their target's energy that they lose; the loss scores,
    scaled to mean 1, add mu times the mean rise of the first step; those of constant
    channels are passed over, for intercepts make up for all of such a channel. Ties:
    the higher index goes.

    Args:
      terms: for each consumer its moments of (R,) rows and (N,) targets, kernel W0
        (R, N), row_channel int (R,) with -1 for rows always present, and the output
        weights s (N,) or None for 1.
      lowest: the least number of channels that is asked for.
      loss_scores: t (C,), larger = the loss needs the channel more.
      ridge: as for `refit`; the default's K is all rows.
      centred: for each consumer whether it has an intercept; default all.

    Raises:
      ScoreError: no consumer, `lowest` not in 1..C, or NaN or infinity in the
        moments or the loss scores.
    """
    if not terms or not 1 <= lowest <= channels:
        raise ScoreError(
            f"elimination needs a consumer and a count in 1..{channels}; found "
            f"{len(terms)} consumers and {lowest}"
        )
    flags = [True] * len(terms) if centred is None else centred
    consumers = [
        _Consumer(*term, channels=channels, ridge=ridge, centred=flag)
        for term, flag in zip(terms, flags, strict=True)
    ]
    alive = np.ones(channels, bool)
    extra, order = np.zeros(channels), []
    for step in range(channels - lowest):
        rises = np.sum([consumer.rises() for consumer in consumers], axis=0)
        if step == 0 and loss_scores is not None and mu:
            moving = np.any([consumer.moving for consumer in consumers], axis=0)
            needed = np.where(moving, loss_scores, 0.0)
            extra = mu * np.abs(rises).mean() * scaled_scores(needed)
        total = np.where(alive, rises + extra, np.inf)
        last = channels - 1 - int(np.argmin(total[::-1]))
        alive[last] = False
        order.append(last)
        for consumer in consumers:
            consumer.remove(last)
    return np.asarray(order, np.int64)


class _Consumer:
    """H^-1 and W of one consumer while channels are taken out.

    Rows lie channel after channel, m for each; a channel with fewer has rows of zeros,
    whose diagonal is 1 in `_matrices`. H^-1 is `_inverse` - `_left` @ `_right`.T: the
    last changes wait there, so that one matrix product makes many of them.
    """

    def __init__(
        self,
        moments: Moments,
        kernel,
        row_channel,
        weight,
        *,
        channels: int,
        ridge: float | None,
        centred: bool,
    ):
        cov = finite_covariances(moments, centred=centred)
        rows, outputs = cov.xy.shape
        prior = np.asarray(kernel, np.float64)
        s = np.ones(outputs) if weight is None else np.asarray(weight, np.float64)
        table = _rows_of(np.asarray(row_channel), channels)
        moves = np.diagonal(cov.xx) > STILL * (np.diagonal(cov.xx) + cov.mean_x**2)
        self.moving = (moves[table] & (table >= 0)).any(1)  # (C,): is no constant
        factor = default_ridge(cov.count, rows) if ridge is None else ridge
        inverse, added = _inverse(cov.xx, row_ridge(np.diagonal(cov.xx), factor))
        # Scaled by s and by the target's energy: what the rises need of W.
        unit = s / np.sqrt(max(float(cov.yy @ s**2), 1e-300))
        solved = (inverse @ (cov.xy + added[:, None] * prior)) * unit
        self._size = size = table.shape[1]
        absent = table.reshape(-1) < 0
        self._inverse = inverse[np.ix_(table.reshape(-1), table.reshape(-1))]
        self._inverse[absent] = self._inverse[:, absent] = 0.0
        self._kernel = np.where(absent[:, None], 0.0, solved[table.reshape(-1)])
        energy = added * ((prior * unit) ** 2).sum(1)
        self._paid = np.where(table < 0, 0.0, energy[table]).sum(1)
        self._alive, self._gone = np.arange(channels), []
        blocks = self._inverse.reshape(channels, size, channels, size)
        self._matrices = blocks[np.arange(channels), :, np.arange(channels)].copy()
        self._matrices[:, np.arange(size), np.arange(size)] += table < 0
        self._clear()

    def _clear(self) -> None:
        shape = (len(self._inverse), BATCH * self._size)
        self._left, self._right, self._waiting = np.zeros(shape), np.zeros(shape), 0

    def rises(self) -> np.ndarray:
        """(C,): how much the error rises without each channel; 0 for those gone."""
        rows = self._kernel.reshape(len(self._alive), self._size, -1)
        energy = rows @ rows.transpose(0, 2, 1)
        quadratic = np.linalg.solve(self._matrices, energy)
        found = np.zeros(len(self._paid))
        found[self._alive] = np.trace(quadratic, axis1=1, axis2=2)
        return found - self._paid

    def remove(self, channel: int) -> None:
        """Takes the channel's rows out and refits the rest."""
        place = int(np.searchsorted(self._alive, channel))
        rows = slice(place * self._size, (place + 1) * self._size)
        done = self._waiting * self._size
        left, right = self._left[:, :done], self._right[:, :done]
        cross = self._inverse[:, rows] - left @ right[rows].T
        solved = cross @ np.linalg.inv(self._matrices[place])
        self._kernel -= solved @ self._kernel[rows]
        shape = (len(self._alive), self._size, self._size)
        self._matrices -= solved.reshape(shape) @ cross.reshape(shape).mT
        self._left[:, done : done + self._size] = solved
        self._right[:, done : done + self._size] = cross
        self._waiting += 1
        # From here on the channel is rows of zeros, as absent ones are.
        self._kernel[rows] = 0.0
        self._matrices[place] = np.eye(self._size)
        self._paid[channel] = 0.0
        self._gone.append(channel)
        if self._waiting == BATCH:
            self._settle()

    def _settle(self) -> None:
        """Makes the changes that wait, and drops the channels that are gone."""
        there = ~np.isin(self._alive, self._gone)
        keep = np.repeat(there, self._size)
        left, right = self._left[keep], self._right[keep]
        self._inverse = self._inverse[np.ix_(keep, keep)] - left @ right.T
        self._kernel = self._kernel[keep]
        self._matrices = self._matrices[there]
        self._alive = self._alive[there]
        self._clear()


def _inverse(gram: np.ndarray, ridge: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(gram + diag(ridge))^-1 and the ridge, raised tenfold while it is not definite."""
    while True:
        try:
            factor = linalg.cho_factor(gram + np.diag(ridge), check_finite=False)
        except linalg.LinAlgError:
            ridge = ridge * 10
            continue
        eye = np.eye(len(gram))
        return linalg.cho_solve(factor, eye, check_finite=False), ridge


def _rows_of(row_channel: np.ndarray, channels: int) -> np.ndarray:
    """int (C, m): the rows of each channel, -1 where it has fewer than m."""
    order = np.argsort(row_channel, kind="stable")
    order = order[row_channel[order] >= 0]
    counts = np.bincount(row_channel[order], minlength=channels)
    table = np.full((channels, max(int(counts.max(initial=0)), 1)), -1)
    starts = np.cumsum(counts) - counts
    column = np.arange(order.size) - np.repeat(starts, counts)
    table[row_channel[order], column] = order
    return table

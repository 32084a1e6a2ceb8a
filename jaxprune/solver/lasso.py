"""The LASSO path on a Gram matrix, followed to an exact number of non-zero gates.

    minimise over b (C,):   1/2 b^T G b - q^T b + lambda * sum_c |b_c|

with b >= 0 or of free sign. The solution is piecewise linear in lambda (Osborne,
Presnell, Turlach 2000; Efron, Hastie, Johnstone, Tibshirani 2004), so the path is
walked from event to event: a gate enters where its correlation c = q - G b reaches
lambda, or leaves where it reaches zero. Between events the active gates A move along
G_AA^-1 s_A, with s the signs. The inverse is updated by rank one: O(k C) an event
with k active gates, in float64 on the host, where the path is a sequence of small
dependent steps that no accelerator speeds up.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import linalg

from jaxprune.errors import ScoreError

# Events closer together than this share of the largest lambda are one event.
TIE = 1e-12
REFRESH = 64  # events between two checks of the optimality conditions


class Selection(NamedTuple):
    """Which gates are kept.

    Attributes:
      kept: int64 (keep,), ascending.
      gates: (C,) float64; non-zero only where kept. Zero on kept gates that the path
        never reached (see `select_exact`).
      lam: the lambda that the gates are the solution at.
    """

    kept: np.ndarray
    gates: np.ndarray
    lam: float


class _Path:
    """State of the walk: active gates in `order`, their rows of G and inverse."""

    def __init__(self, gram, linear, *, nonnegative, limit, tie_break, dependent):
        self.gram, self.linear, self.nonnegative = gram, linear, nonnegative
        self.dependent = dependent
        size = len(linear)
        # Earlier in `rank` wins a tie: larger tie_break, then lower index.
        self.rank = np.empty(size, np.int64)
        self.rank[np.lexsort((np.arange(size), -tie_break))] = np.arange(size)
        self.order = np.zeros(limit, np.int64)
        self.rows = np.empty((limit, size))
        self.inverse = np.empty((limit, limit))
        self.gates = np.empty(limit)
        self.signs = np.empty(limit)
        self.count = 0
        self.active = np.zeros(size, bool)
        diagonal = np.diagonal(gram)
        self.dead = diagonal <= 1e-14 * max(diagonal.max(initial=0.0), 1e-300)
        self.barred = self.dead.copy()
        self.correlation = linear.copy()
        self.direction = np.zeros(0)
        self.slope = np.zeros(size)
        reach = linear if nonnegative else np.abs(linear)
        self.lam = float(max(reach[~self.barred].max(initial=0.0), 0.0))
        self.top = max(self.lam, 1e-300)

    def enter(self, gate: int, sign: float) -> bool:
        """Adds a gate; False (and barred) if the active ones already span it."""
        k, row = self.count, self.gram[gate]
        known = row[self.order[:k]]
        combo = self.inverse[:k, :k] @ known
        fresh = row[gate] - known @ combo
        if fresh <= self.dependent * row[gate]:
            self.barred[gate] = True
            return False
        _rank_one(self.inverse, k, combo, 1 / fresh)
        self.inverse[k, :k] = self.inverse[:k, k] = -combo / fresh
        self.inverse[k, k] = 1 / fresh
        self.order[k], self.rows[k] = gate, row
        pull = (sign - combo @ self.signs[:k]) / fresh
        self.direction = np.append(self.direction - pull * combo, pull)
        self.gates[k], self.signs[k] = 0.0, sign
        self.active[gate] = True
        self.count += 1
        self.slope = self.direction @ self.rows[: k + 1]
        return True

    def leave(self, place: int) -> None:
        """Removes the gate at `place` of the order."""
        k = self.count - 1
        self.active[self.order[place]] = False
        for array in (self.order, self.gates, self.signs, self.rows):
            array[place] = array[k]
        column = self.inverse[: k + 1, place].copy()
        column[place], pivot = column[k], column[place]
        if place != k:
            self.inverse[place, : k + 1] = self.inverse[k, : k + 1]
            self.inverse[: k + 1, place] = self.inverse[: k + 1, k]
            self.inverse[place, place] = self.inverse[k, k]
        _rank_one(self.inverse, k, column[:k], -1 / pivot)
        self.count = k
        # What was spanned before may not be any more; dead gates stay out.
        self.barred = self.dead.copy()
        self.turn()

    def turn(self) -> None:
        """Sets the direction of the active gates and the slope of correlations."""
        k = self.count
        self.direction = self.inverse[:k, :k] @ self.signs[:k]
        self.slope = self.direction @ self.rows[:k]

    def next_entry(self, left: tuple[int, float] = (-1, 0.0), *, beyond_ties=False):
        """(step in lambda, gate, sign) of the next gate to enter; inf if none.

        left: the gate that has just left, and the sign that it cannot take up again at
        once; the other one it can.
        """
        best = (np.inf, -1, 1.0)
        candidates = ~(self.active | self.barred)
        for sign in (1.0,) if self.nonnegative else (1.0, -1.0):
            gap = np.maximum(self.lam - sign * self.correlation, 0.0)
            rate = 1.0 - sign * self.slope
            usable = candidates & (rate > 1e-12)
            if sign == left[1]:
                usable[left[0]] = False
            if beyond_ties:
                usable &= gap > TIE * self.top * rate
            if not usable.any():
                continue
            step = np.where(usable, gap / np.where(usable, rate, 1.0), np.inf)
            tied = np.flatnonzero(step <= step.min() + TIE * self.top)
            gate = int(tied[np.argmin(self.rank[tied])])
            if step[gate] < best[0]:
                best = (float(step[gate]), gate, sign)
        return best

    def next_exit(self):
        """(step in lambda, place) of the next gate to reach zero; inf if none."""
        k = self.count
        toward_zero = self.direction * self.signs[:k] < 0
        held = np.abs(self.gates[:k])
        step = np.full(k, np.inf)
        np.divide(held, np.abs(self.direction), out=step, where=toward_zero)
        place = int(np.argmin(step)) if k else -1
        return (float(step[place]), place) if k else (np.inf, -1)

    def advance(self, step: float) -> None:
        self.gates[: self.count] += step * self.direction
        self.correlation -= step * self.slope
        self.lam -= step

    def refresh(self) -> None:
        """Recomputes correlations, and the inverse too where it has drifted."""
        k = self.count
        order, signs = self.order[:k], self.signs[:k]
        self.correlation = self.linear - self.gates[:k] @ self.rows[:k]
        drift = np.abs(self.correlation[order] - self.lam * signs).max(initial=0.0)
        if drift > 1e-10 * self.top:
            self.inverse[:k, :k] = _inverse(self.rows[:k][:, order])
            target = self.linear[order] - self.lam * signs
            self.gates[:k] = self.inverse[:k, :k] @ target
            self.correlation = self.linear - self.gates[:k] @ self.rows[:k]
        self.turn()


def _rank_one(matrix: np.ndarray, size: int, vector: np.ndarray, scale: float) -> None:
    """matrix[:size, :size] += scale * vector vector^T, in blocks that fit the cache."""
    for start in range(0, size, 64):
        stop = min(start + 64, size)
        block = np.outer(vector[start:stop] * scale, vector)
        matrix[start:stop, :size] += block


def _inverse(matrix: np.ndarray) -> np.ndarray:
    try:
        factor = linalg.cho_factor(matrix, lower=True, check_finite=False)
        return linalg.cho_solve(factor, np.eye(len(matrix)), check_finite=False)
    except linalg.LinAlgError:
        return np.linalg.pinv(matrix, hermitian=True)


def _walk(path: _Path, *, lam_stop: float, count_stop: int) -> None:
    """Follows the path down to `lam_stop`, or until `count_stop` gates are active."""
    just_left = (-1, 0.0)
    # Each event changes one gate; far more events than gates means cycling on noise.
    for event in range(1, 20 * len(path.linear) + 100):
        step_in, gate, sign = path.next_entry(just_left)
        step_out, place = path.next_exit()
        if path.lam - lam_stop <= min(step_in, step_out):
            path.advance(path.lam - lam_stop)
            return
        path.advance(min(step_in, step_out))
        just_left = (-1, 0.0)
        if step_out <= step_in:
            just_left = int(path.order[place]), float(path.signs[place])
            path.leave(place)
        elif path.enter(gate, sign) and path.count == count_stop:
            return
        if event % REFRESH == 0:
            path.refresh()


def _system(gram, linear) -> tuple[np.ndarray, np.ndarray]:
    gram = np.ascontiguousarray(gram, np.float64)
    linear = np.ascontiguousarray(linear, np.float64)
    if linear.ndim != 1 or gram.shape != (linear.size, linear.size):
        raise ScoreError(
            f"the gate system needs gram (C, C) and linear (C,); found {gram.shape} "
            f"and {linear.shape}"
        )
    if not (np.isfinite(gram).all() and np.isfinite(linear).all()):
        raise ScoreError(
            "the gate system holds NaN or infinity: the calibration activations or "
            "gradients overflowed; check the weights, or run the model in float32"
        )
    return (gram + gram.T) / 2, linear


def lasso(gram, linear, lam: float, *, nonnegative: bool = True) -> np.ndarray:
    """Gates (C,) float64 that minimise the objective of this module at `lam`.

    scikit-learn's Lasso(alpha) on n rows X, y is gram = X^T X / n, linear = X^T y / n
    at lam = alpha. Where gram is singular the solution is one of several.

    Raises:
      ScoreError: wrong shapes, NaN or infinity.
    """
    gram, linear = _system(gram, linear)
    size = linear.size
    path = _Path(
        gram,
        linear,
        nonnegative=nonnegative,
        limit=size,
        tie_break=np.zeros(size),
        dependent=1e-11,
    )
    if path.lam > lam:
        _walk(path, lam_stop=float(lam), count_stop=-1)
    gates = np.zeros(size)
    gates[path.order[: path.count]] = _polished(path, float(lam))
    return gates


def _polished(path: _Path, lam: float) -> np.ndarray:
    """Active gates solved afresh at `lam`, free of what the updates accumulated."""
    k = path.count
    if not k:
        return np.zeros(0)
    order = path.order[:k]
    target = path.linear[order] - lam * path.signs[:k]
    matrix = path.rows[:k][:, order]
    try:
        solved = linalg.solve(matrix, target, assume_a="pos", check_finite=False)
    except linalg.LinAlgError:
        return path.gates[:k]
    # Rounding must not flip a gate that has just entered at zero.
    return np.where(solved * path.signs[:k] > 0, solved, 0.0)


def select_exact(
    gram,
    linear,
    keep: int,
    *,
    nonnegative: bool = True,
    tie_break=None,
    dependent: float = 1e-11,
) -> Selection:
    """The first solution on the path, from large lambda down, with `keep` gates.

    Lambda is the middle of the interval on which exactly these gates are non-zero.
    Gates that reach lambda together enter in the order of `tie_break` (C,), largest
    first, then of the index. If the path ends with fewer gates (dead or duplicated
    channels, gates the LASSO never wants), the largest `tie_break` fill up, those
    with any energy first, with gate 0; without a `tie_break` it is `linear`. keep == C keeps all with gates 1, lam 0.

    Args:
      dependent: a gate whose energy outside the span of the active ones is below
        this share of its own is redundant with them, and does not enter.

    Raises:
      ScoreError: wrong shapes, NaN, or `keep` not in 1..C.
    """
    gram, linear = _system(gram, linear)
    size = linear.size
    if not 1 <= keep <= size:
        raise ScoreError(
            f"keep must lie in 1..{size}, the gates there are; found {keep}"
        )
    if keep == size:
        return Selection(np.arange(size), np.ones(size), 0.0)
    tie = linear if tie_break is None else np.asarray(tie_break, np.float64)
    if tie.shape != linear.shape or np.isnan(tie).any():
        raise ScoreError(f"tie_break must be ({size},) without NaN; found {tie.shape}")
    path = _Path(
        gram,
        linear,
        nonnegative=nonnegative,
        limit=keep,
        tie_break=tie,
        dependent=dependent,
    )
    _walk(path, lam_stop=0.0, count_stop=keep)
    lam = path.lam
    if path.count == keep and lam > 0:
        end = min(path.next_entry(beyond_ties=True)[0], path.next_exit()[0], lam)
        lam -= end / 2
    gates = np.zeros(size)
    gates[path.order[: path.count]] = _polished(path, lam)
    kept = np.zeros(size, bool)
    kept[path.order[: path.count]] = True
    rest = np.flatnonzero(~kept)
    rest = rest[np.lexsort((rest, -tie[rest], np.diagonal(gram)[rest] <= 0))]
    kept[rest[: keep - path.count]] = True
    return Selection(np.flatnonzero(kept), gates, float(lam))

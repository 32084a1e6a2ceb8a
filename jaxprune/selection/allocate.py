"""How many channels each group keeps, from what each loses: a knapsack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from jaxprune.errors import ScoreError
from jaxprune.records import Group
from jaxprune.selection.fit import Limits, MinKeep, fit, limits
from jaxprune.selection.plans import Cost


def allocate(
    groups: Sequence[Group],
    loss_curves: Mapping[str, object],
    cost_fn: Cost,
    limit: float,
    *,
    rounds: int = 4,
    round_to: int = 1,
    min_keep: MinKeep = 1,
    min_ratio: float = 0.0,
    overrides: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
) -> dict[str, int]:
    """Counts {name: kept} that lose least at cost <= limit, by each group's own curve.

    minimise sum_g loss_g(k_g) subject to cost(k) <= limit, the knapsack that a
    layer-by-layer method leaves open. Lagrangian relaxation: a channel's priority is
    the slope of the curve's lower convex hull over what the channel costs. MACs are
    not a sum over groups (input times output width), so the costs are taken at the
    counts found so far, `rounds` times, and the best counts by loss are returned.
    Costs about rounds * (groups + 20) calls of `cost_fn`, plus filling.

    Args:
      loss_curves: per group either (C + 1,) losses at 0, 1, ..., C kept channels, or
        a pair (counts, losses) of samples, interpolated linearly.

    Raises:
      ScoreError: a curve is missing, too short, or holds NaN.
      BudgetError, PlanError: as for `select`.
    """
    bounds = limits(
        groups,
        round_to=round_to,
        min_keep=min_keep,
        min_ratio=min_ratio,
        overrides=overrides,
        ignore=ignore,
    )
    curves = {g.name: _curve(g, loss_curves) for g in groups}
    slopes = {n: _hull_slopes(curve, bounds.low[n]) for n, curve in curves.items()}

    def cost(counts: Mapping[str, int]) -> float:
        return cost_fn({n: np.arange(k) for n, k in counts.items()})

    counts = best = {g.name: g.size for g in groups}
    best_loss = np.inf
    for _ in range(max(rounds, 1)):
        price = _prices(groups, counts, cost, bounds)
        priorities = {n: slope / price[n] for n, slope in slopes.items()}
        found = fit(groups, priorities, cost, limit, bounds)
        loss = sum(curves[n][k] for n, k in found.items())
        if loss < best_loss:
            best, best_loss = found, loss
        if found == counts:
            break
        counts = found
    return best


def _prices(groups, counts, cost, bounds: Limits) -> dict[str, float]:
    """What one channel of each group costs at these counts; tiny where nothing."""
    here, price = cost(counts), {}
    for group in groups:
        name = group.name
        # A tenth of the group: one channel's cost drowns in a measured latency.
        span = max(group.size // 10, bounds.step)
        other = counts[name] - span
        if other < 1:
            other = min(counts[name] + span, group.size)
        change = other - counts[name]
        moved = cost({**counts, name: other}) if change else here
        price[name] = (moved - here) / change if change else 0.0
    positive = [p for p in price.values() if p > 0]
    least = 1e-6 * max(positive, default=1.0)
    return {name: max(p, least) for name, p in price.items()}


def _curve(group: Group, loss_curves) -> np.ndarray:
    """Losses (C + 1,), finite from count 1 on and never rising with the count."""
    given = loss_curves.get(group.name)
    if given is None:
        raise ScoreError(f"group {group.name!r} has no loss curve")
    if isinstance(given, tuple):
        at, losses = (np.asarray(a, np.float64) for a in given)
        sort = np.argsort(at)
        grid = np.arange(group.size + 1)
        curve = np.interp(grid, at[sort], losses[sort])
    else:
        curve = np.asarray(given, np.float64)
    if curve.shape != (group.size + 1,) or not np.isfinite(curve[1:]).all():
        raise ScoreError(
            f"group {group.name!r}: expected a loss at each of 0..{group.size} kept "
            f"channels, or (counts, losses); found shape {curve.shape} with "
            f"{int((~np.isfinite(curve[1:])).sum())} values NaN or infinite"
        )
    return np.minimum.accumulate(curve)


def _hull_slopes(curve: np.ndarray, low: int) -> np.ndarray:
    """(C,): how much the k-th channel lowers the lower convex hull of the curve.

    The first `low` channels are always there: their slope is infinite.
    """
    size = curve.size - 1
    hull: list[int] = []
    for k in range(low, size + 1):
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            rise = (curve[b] - curve[a]) * (k - a) - (curve[k] - curve[a]) * (b - a)
            if rise < 0:
                break
            hull.pop()
        hull.append(k)
    slopes = np.full(size, np.inf)
    grid = np.arange(low, size + 1)
    slopes[low:] = -np.diff(np.interp(grid, hull, curve[hull]))
    return slopes

"""Which channels stay: scores and a budget in, a plan out, never over the budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal, get_args

import numpy as np

from jaxprune.checks import Rule, check_values, one_of
from jaxprune.errors import ScoreError
from jaxprune.records import Group, Plan
from jaxprune.selection.fit import MinKeep, fit, limits, places

Cost = Callable[[Mapping[str, np.ndarray]], float]
Strategy = Literal["uniform", "global", "isomorphic"]
Normalize = Literal["none", "mean", "max", "sum", "l2", "standard", "minmax", "rank"]
# How `select` ranks.
RANKING_RULES: dict[str, Rule] = {
    "strategy": one_of(*get_args(Strategy)),
    "normalize": one_of(*get_args(Normalize)),
}


def select(
    groups: Sequence[Group],
    scores: Mapping[str, np.ndarray],
    cost_fn: Cost,
    limit: float,
    *,
    strategy: Strategy = "uniform",
    normalize: Normalize = "mean",
    round_to: int = 1,
    min_keep: MinKeep = 1,
    min_ratio: float = 0.0,
    overrides: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
) -> Plan:
    """The plan that keeps the channels of the highest priority at cost <= limit.

    Args:
      scores: (C,) per group, larger = keep; equal scores keep the lower index.
      cost_fn: cost of {name: sorted kept indices}; never falls as channels are added.
      strategy: "uniform": the same share of every group. "global": one ranking of all
        channels by normalised score. "isomorphic": the same share of every set of
        groups of equal structure, ranked within the set (Fang et al. 2024).
      normalize: what a group's scores are divided by before groups are compared, for
        "global" and "isomorphic"; "rank" makes global the same as uniform.
      round_to, min_keep, min_ratio, overrides, ignore: see `limits`.

    Raises:
      ConfigError: an option of a wrong type or out of range.
      ScoreError: a group without scores, wrong shape, NaN or infinity.
      BudgetError: the least legal plan costs more than `limit`; says how much.
    """
    check_values({"strategy": strategy, "normalize": normalize}, RANKING_RULES)
    bounds = limits(
        groups,
        round_to=round_to,
        min_keep=min_keep,
        min_ratio=min_ratio,
        overrides=overrides,
        ignore=ignore,
    )
    scores = checked_scores(groups, scores)
    order = {n: np.lexsort((np.arange(s.size), -s)) for n, s in scores.items()}
    ranked = {n: s[order[n]] for n, s in scores.items()}
    priorities = _priorities(groups, ranked, strategy, normalize)

    def keep(counts: Mapping[str, int]) -> dict[str, np.ndarray]:
        return {n: np.sort(order[n][:k]) for n, k in counts.items()}

    counts = fit(groups, priorities, lambda c: cost_fn(keep(c)), limit, bounds)
    return Plan(keep(counts), {g.name: g.size for g in groups})


def uniform_counts(
    groups: Sequence[Group],
    cost_fn: Cost,
    limit: float,
    *,
    round_to: int = 1,
    min_keep: MinKeep = 1,
    min_ratio: float = 0.0,
    overrides: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
) -> dict[str, int]:
    """Counts {name: kept} of equal shares, for methods that choose channels themselves.

    `cost_fn` is called with the first channels of each group. Options and errors as
    for `select`.
    """
    plan = select(
        groups,
        {g.name: -np.arange(g.size, dtype=np.float64) for g in groups},
        cost_fn,
        limit,
        round_to=round_to,
        min_keep=min_keep,
        min_ratio=min_ratio,
        overrides=overrides,
        ignore=ignore,
    )
    return {name: kept.size for name, kept in plan.items()}


def checked_scores(
    groups: Sequence[Group], scores: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Float64 scores of every group.

    Raises:
      ScoreError: lists every group whose scores are missing or cannot be ranked.
    """
    problems, clean = [], {}
    for group in groups:
        if group.name not in scores:
            problems.append(f"group {group.name!r}: no scores")
            continue
        values = np.asarray(scores[group.name], np.float64)
        if values.shape != (group.size,):
            problems.append(
                f"group {group.name!r}: expected ({group.size},), found {values.shape}"
            )
        elif not np.isfinite(values).all():
            problems.append(
                f"group {group.name!r}: {int((~np.isfinite(values)).sum())} of "
                f"{group.size} scores are NaN or infinite"
            )
        clean[group.name] = values
    if problems:
        raise ScoreError(
            "scores cannot be ranked; give one finite number per channel:\n  "
            + "\n  ".join(problems)
        )
    return clean


def _normalized(values: np.ndarray, how: Normalize) -> np.ndarray:
    """Scores (C,), descending, on a scale that groups share."""
    size = values.size
    if how == "rank":
        return -(np.arange(size) + 0.5) / size
    if how == "minmax":
        span = values.max() - values.min()
        return (values - values.min()) / (span if span > 0 else 1.0)
    if how == "standard":
        deviation = values.std()
        return (values - values.mean()) / (deviation if deviation > 0 else 1.0)
    scales = {
        "none": lambda: 1.0,
        "mean": lambda: np.abs(values).mean(),
        "max": lambda: np.abs(values).max(),
        "sum": lambda: np.abs(values).sum(),
        "l2": lambda: np.linalg.norm(values),
    }
    scale = scales[how]()
    return values / scale if scale > 0 else values


def signature(group: Group) -> tuple[tuple[str, int, str, int], ...]:
    """What makes two groups isomorphic: their slots' roles, axes, leaves and runs."""
    return tuple(
        sorted(
            (s.role, s.axis, s.path.rsplit("/", 1)[-1], s.index.shape[1])
            for s in group.slots
        )
    )


def _priorities(groups, ranked, strategy: Strategy, normalize: Normalize):
    """Priority (C,) of the group's best, second best, ... channel; descending."""
    if strategy == "uniform":
        return {name: _normalized(values, "rank") for name, values in ranked.items()}
    scaled = {name: _normalized(values, normalize) for name, values in ranked.items()}
    if strategy == "global":
        return scaled
    scopes: dict[object, list[str]] = {}
    for group in groups:
        scopes.setdefault(signature(group), []).append(group.name)
    result = {}
    for names in scopes.values():
        values = np.concatenate([scaled[n] for n in names])
        place = np.empty(values.size)
        order = np.lexsort((places(scaled[n].size for n in names), -values))
        place[order] = np.arange(values.size)
        share = -(place + 0.5) / values.size
        ends = np.cumsum([scaled[n].size for n in names])[:-1]
        result.update(zip(names, np.split(share, ends), strict=True))
    return result

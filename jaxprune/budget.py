"""One budget of several kinds as a limit on a cost of the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.errors import BudgetError
from jaxprune.graph import ChannelGraph
from jaxprune.records import Budget, Group, Plan
from jaxprune.selection import select as select_plan

FRACTIONS = ("macs", "params", "bytes", "keep")


class Constraint(NamedTuple):
    """cost_fn(kept indices by group) <= limit."""

    budget: Budget
    cost_fn: Callable[[Mapping[str, np.ndarray]], float]
    limit: float


def one_budget(**asked: float | None) -> Budget | None:
    """The budget that is not None; None if none is asked.

    Raises:
      BudgetError: several at once, or a share outside (0, 1].
    """
    given = {kind: value for kind, value in asked.items() if value is not None}
    if len(given) > 1:
        raise BudgetError(f"expected one budget, found {given}; leave one of them")
    for kind, value in given.items():
        if not isinstance(value, int | float) or not 0 < value <= 1:
            raise BudgetError(
                f"{kind}={value!r} is the share that REMAINS: a number above 0 and at "
                "most 1, such as 0.5 for half"
            )
        return Budget(kind, float(value))  # type: ignore[arg-type]
    return None


def constraint(
    graph: ChannelGraph, budget: Budget, groups: Sequence[Group]
) -> Constraint:
    """The budget as a cost and its limit; "keep" counts channels of these groups."""
    if budget.kind == "keep":

        def count(keep: Mapping[str, np.ndarray]) -> float:
            return float(sum(len(keep.get(g.name, range(g.size))) for g in groups))

        return Constraint(budget, count, budget.value * sum(g.size for g in groups))

    def cost(keep: Mapping[str, np.ndarray]) -> float:
        return graph.cost(budget.kind, keep)

    return Constraint(budget, cost, budget.value * graph.cost(budget.kind))


def select(
    graph: ChannelGraph,
    scores: Mapping[str, Any],
    *,
    macs: float | None = None,
    params: float | None = None,
    bytes: float | None = None,
    keep: float | None = None,
    groups: Sequence[Group] | None = None,
    **options: Any,
) -> Plan:
    """The plan that keeps the best-scored channels within the budget.

    Args:
      graph: from `trace`.
      scores: {group name: (C,)}, larger = keep.
      macs, params, bytes, keep: the share that remains, one of them: of the
        multiply-accumulates, parameters, bytes of all arrays, or channels.
      groups: those to prune, by default all; the others are kept whole.
      **options: strategy, normalize, round_to, min_keep, min_ratio, overrides and
        ignore, see `jaxprune.selection.select`.

    Raises:
      BudgetError: no budget or several, or none of the plans allowed meets it.
      ScoreError: scores that cannot be ranked.
    """
    budget = one_budget(macs=macs, params=params, bytes=bytes, keep=keep)
    if budget is None:
        raise BudgetError("no budget: pass macs=, params=, bytes= or keep=")
    groups = graph.groups if groups is None else tuple(groups)
    bound = constraint(graph, budget, groups)
    plan = select_plan(groups, scores, bound.cost_fn, bound.limit, **options)
    return graph.complete(plan)


def achieved(graph: ChannelGraph, plan: Plan) -> dict[str, float]:
    """The shares that remain under a plan, for the report."""
    kept = sum(k.size for k in plan.values())
    shares = {
        k: graph.cost(k, plan) / graph.cost(k) for k in ("macs", "params", "bytes")
    }
    return {**shares, "keep": kept / max(sum(plan.sizes.values()), 1)}

"""One budget of several kinds as a limit on a cost of the graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from jaxprune.checks import check_names, is_number, scalar
from jaxprune.errors import BudgetError, ConfigError, ScoreError
from jaxprune.graph import ChannelGraph
from jaxprune.latency import LatencyTable, Progress, measure_latency, with_batch
from jaxprune.records import Budget, Group, Plan
from jaxprune.selection import LIMIT_RULES, RANKING_RULES, limits
from jaxprune.selection import select as select_plan

KINDS = ("macs", "params", "bytes", "latency_ms", "keep")
# A latency table that misses by more than this share is corrected by what was
# measured, so often at most; every time costs compiling the slim model.
MISS = 0.05
CORRECTIONS = 2

T = TypeVar("T")


class Constraint(NamedTuple):
    """cost_fn(kept indices by group) <= limit.

    Attributes:
      budget: as asked, in the user's units.
      cost_fn: MACs, parameters, bytes, channels, or milliseconds of a batch.
      limit: what is allowed of it.
      whole: what the unpruned network takes.
      table: what predicts the milliseconds, for "latency_ms".
    """

    budget: Budget
    cost_fn: Callable[[Mapping[str, np.ndarray]], float]
    limit: float
    whole: float
    table: LatencyTable | None = None

    def asked(self, limit: float | None = None) -> float:
        """A limit in the user's units: a share of the whole, or milliseconds."""
        limit = self.limit if limit is None else limit
        if self.table is not None:
            return limit
        return round(limit / self.whole, 9) if self.whole else 0.0


def one_budget(**asked: Any) -> Budget | None:
    """The budget that is not None; None if none is asked.

    Raises:
      BudgetError: several at once, or a value out of range.
    """
    given = {kind: scalar(v) for kind, v in asked.items() if v is not None}
    if len(given) > 1:
        raise BudgetError(f"expected one budget, found {given}; leave one of them")
    for kind, value in given.items():
        number = is_number(value)
        if kind == "latency_ms" and not (number and value > 0):
            raise BudgetError(
                f"latency_ms={value!r}: expected milliseconds above 0, of one batch on "
                "this device; jaxprune.cost.latency_ms(model, variables, x) measures "
                "what it takes now"
            )
        if kind != "latency_ms" and not (number and 0 < value <= 1):
            raise BudgetError(
                f"{kind}={value!r} is the share that REMAINS: a number above 0 and at "
                "most 1, such as 0.5 for half"
            )
        return Budget(kind, float(value))  # type: ignore[arg-type]
    return None


def constraint(
    graph: ChannelGraph,
    budget: Budget,
    groups: Sequence[Group],
    *,
    batch: int | None = None,
    on_progress: Progress | None = None,
) -> Constraint:
    """The budget as a cost and its limit; "keep" counts channels of these groups.

    For "latency_ms" the layers are measured on this device, with `batch` examples or
    those that the graph was traced with.
    """
    if budget.kind == "latency_ms":
        table = measure_latency(with_batch(graph, batch), on_progress=on_progress)
        return Constraint(
            budget, table.predict, budget.value, table.base_ms, table=table
        )
    if budget.kind == "keep":

        def cost(keep: Mapping[str, np.ndarray]) -> float:
            return float(sum(len(keep.get(g.name, range(g.size))) for g in groups))

        whole = float(sum(g.size for g in groups))
    else:

        def cost(keep: Mapping[str, np.ndarray]) -> float:
            return graph.cost(budget.kind, keep)

        whole = float(graph.cost(budget.kind))
    # 0.081 * 1000 is 81.00000000000001 in floating point, 0.57 * 100 below 57.
    return Constraint(budget, cost, budget.value * whole * (1 + 1e-12), whole)


def check_feasible(
    bound: Constraint, groups: Sequence[Group], options: Mapping[str, Any]
) -> None:
    """Nothing, if the smallest legal counts meet the budget.

    Args:
      options: of the selection; those in `LIMIT_RULES` decide which counts are legal.

    Raises:
      BudgetError: they do not; says the nearest budget that can be met.
    """
    given = {name: options[name] for name in LIMIT_RULES if name in options}
    low = limits(groups, **given).low
    least = bound.cost_fn({name: np.arange(count) for name, count in low.items()})
    if least <= bound.limit:
        return
    kind, unit = bound.budget.kind, " ms" if bound.table is not None else ""
    nearest = rounded_up(bound.asked(least))
    relax = ", ".join(f"{name}={value}" for name, value in given.items() if value)
    raise BudgetError(
        f"{kind}={bound.asked():.4g}{unit} cannot be met: the least is "
        f"{kind}={nearest}{unit}, with every group at its smallest legal count; ask "
        "for at least that" + (f", or relax {relax}" if relax else "")
    )


def rounded_up(value: float, digits: int = 3) -> float:
    """The least number of so many significant digits that is not below `value`."""
    if value <= 0:
        return 0.0
    places = digits - 1 - math.floor(math.log10(value))
    scaled = value * 10.0**places * (1 - 1e-12)  # 81.00000000000001 was 81
    return float(f"{math.ceil(scaled)}e{-places}")


def settle(
    bound: Constraint,
    choose: Callable[[Constraint], T],
    keep_of: Callable[[T], Plan | Mapping[str, np.ndarray]],
) -> tuple[T, Constraint]:
    """What `choose` finds within a budget, and the constraint it was found under.

    For latency the slim model of the choice is measured; where the table misses by
    more than `MISS` it is corrected and the choice made again.
    """
    found = choose(bound)
    for _ in range(CORRECTIONS if bound.table is not None else 0):
        assert bound.table is not None
        keep = keep_of(found)
        measured, predicted = bound.table.measure(keep), bound.table.predict(keep)
        if abs(measured - predicted) <= MISS * predicted:
            break
        table = bound.table.corrected(keep, measured)
        bound = bound._replace(table=table, cost_fn=table.predict)
        found = choose(bound)
    return found, bound


def select(
    graph: ChannelGraph,
    scores: Mapping[str, Any],
    *,
    macs: float | None = None,
    params: float | None = None,
    bytes: float | None = None,
    latency_ms: float | None = None,
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
      latency_ms: instead of them, what one batch may take on this device: as many
        examples as the graph was traced with. Measures the layers and the slim model,
        see `jaxprune.latency`; holds as well as times repeat on the device.
      groups: those to prune, by default all; the others are kept whole.
      **options: strategy, normalize, round_to, min_keep, min_ratio, overrides and
        ignore, see `jaxprune.selection.select`.

    Raises:
      ConfigError: an unknown option, or a value of a wrong type or out of range.
      BudgetError: no budget or several, or none of the plans allowed meets it; says
        the nearest that can be met.
      ScoreError: scores that cannot be ranked, or of groups that the graph lacks.
    """
    budget = one_budget(
        macs=macs, params=params, bytes=bytes, latency_ms=latency_ms, keep=keep
    )
    if budget is None:
        raise BudgetError(NO_BUDGET)
    check_names(options, (*RANKING_RULES, *LIMIT_RULES), "select")
    groups = graph.groups if groups is None else _own(graph, groups)
    names = [group.name for group in graph.groups]
    unknown = sorted(set(scores) - set(names))
    if unknown:
        raise ScoreError(
            f"scores of {len(unknown)} groups that this graph lacks, the first "
            f"{unknown[0]!r}; it has {names[:8]}: score the model that was traced"
        )
    bound = constraint(graph, budget, groups)
    return select_within(graph, scores, bound, groups, options)[0]


def _own(graph: ChannelGraph, groups: Any) -> tuple[Group, ...]:
    """The groups as a tuple.

    Raises:
      ConfigError: not all of them are groups of the graph.
    """
    known = {(group.name, group.size) for group in graph.groups}
    listed = isinstance(groups, Iterable) and not isinstance(groups, str)
    groups = tuple(groups) if listed else (groups,)
    own = (isinstance(g, Group) and (g.name, g.size) in known for g in groups)
    if not all(own):
        raise ConfigError(
            f"groups must be Groups of this graph; found {str(groups)[:60]}: take them "
            "from graph.groups, or by graph.group(name)"
        )
    return groups


NO_BUDGET = "no budget: pass macs=, params=, bytes=, latency_ms= or keep="


def select_within(
    graph: ChannelGraph,
    scores: Mapping[str, Any],
    bound: Constraint,
    groups: Sequence[Group],
    options: Mapping[str, Any],
) -> tuple[Plan, Constraint]:
    """As `select` under a constraint; also the constraint, corrected for latency."""

    def choose(bound: Constraint) -> Plan:
        check_feasible(bound, groups, options)
        plan = select_plan(groups, scores, bound.cost_fn, bound.limit, **options)
        return graph.complete(plan)

    return settle(bound, choose, lambda plan: plan)


def predicted_ms(bound: Constraint | None, plan: Plan | None) -> float | None:
    """What the latency table says of a plan; None where no latency is asked."""
    if bound is None or bound.table is None or plan is None:
        return None
    return bound.table.predict(plan)


def achieved(graph: ChannelGraph, plan: Plan) -> dict[str, float]:
    """The shares that remain under a plan, for the report."""
    kept = sum(k.size for k in plan.values())
    shares = {
        k: graph.cost(k, plan) / graph.cost(k) for k in ("macs", "params", "bytes")
    }
    return {**shares, "keep": kept / max(sum(plan.sizes.values()), 1)}

"""Counts that a model's source can follow, near those that a budget asks for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from jaxprune.following import fits, follow
from jaxprune.graph import ChannelGraph
from jaxprune.records import Plan

# Sources that assert `width % heads == 0` follow multiples of a number such as these.
_STEPS = (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32)


def repaired(
    graph: ChannelGraph,
    plan: Plan,
    shortened: Callable[[Mapping[str, int]], Plan],
    low: Mapping[str, int],
    round_to: int = 1,
) -> tuple[Plan, dict[str, str]]:
    """The plan, or one with fewer channels in the groups that the source cannot follow
    at these counts; and those that it follows at none of the counts tried, and why.

    Args:
      shortened: {group: count} -> the plan with fewer channels in these groups.
      low: the least legal count of each group.
      round_to: counts are multiples of it.
    """
    if fits(graph, plan):
        return plan, {}
    _, left = follow(graph, plan)
    for step in dict.fromkeys(math.lcm(step, round_to) for step in _STEPS):
        counts = {name: plan[name].size // step * step for name in left}
        if all(count >= low[name] for name, count in counts.items()):
            other = shortened(counts)
            if fits(graph, other):
                return other, {}
    return plan, left

"""Legal counts, and the longest affordable top of a priority list.

Every strategy is one idea: give each channel a priority, keep the top of the list.
The length of the top is bisected on the true cost, then what the budget still has
room for is filled step by step. Counts are legal at every moment: within the caps,
multiples of `round_to` (or the group's whole size), never zero.
"""

from __future__ import annotations

import fnmatch
import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxprune.checks import (
    NAMES,
    SHARE,
    Rule,
    by_pattern,
    check_values,
    either,
    number,
    optional,
    whole,
)
from jaxprune.errors import BudgetError, ConfigError, PlanError
from jaxprune.records import Group

# A number for all groups, or {name pattern: number}.
MinKeep = int | Mapping[str, int]
# Calls of the cost function that filling up may take, after the bisection's 20.
FILL_CALLS = 400
# What `limits` takes.
LIMIT_RULES: dict[str, Rule] = {
    "round_to": whole(1),
    "min_keep": either(whole(1), by_pattern(whole(1))),
    "min_ratio": number(0, 1),
    "overrides": optional(by_pattern(SHARE)),
    "ignore": NAMES,
}


class Limits(NamedTuple):
    """Legal counts of each group, {name: count}; a count is legal in steps of `step`."""

    low: Mapping[str, int]
    high: Mapping[str, int]
    step: int
    links: Sequence[Link] = ()

    def legal(self, name: str, count: int, size: int) -> int:
        """The least legal count that is not below `count`, at most the largest."""
        rounded = min(math.ceil(count / self.step) * self.step, size)
        return int(np.clip(rounded, self.low[name], self.high[name]))

    def all_legal(
        self, counts: Mapping[str, int], sizes: Mapping[str, int]
    ) -> dict[str, int]:
        """As `legal`, of all groups; linked ones at the mean of their shares."""
        found = {name: self.legal(name, k, sizes[name]) for name, k in counts.items()}
        for link in self.links:
            share = np.mean([counts[name] / sizes[name] for name in link.parts])
            found.update(link.at(float(share) * link.most))
        return found


class Link(NamedTuple):
    """Groups that keep alike shares: `parts[name] * n` channels each, for one n.

    Attributes:
      parts: {group: channels for n = 1}.
      low, high: the least and the largest n.
      step: n is a multiple of it, or `most`.
      most: the n at which all are whole.
    """

    parts: Mapping[str, int]
    low: int
    high: int
    step: int
    most: int

    def at(self, number: float) -> dict[str, int]:
        """The counts at the least legal n that is not below `number`."""
        rounded = math.ceil(math.ceil(number - 1e-9) / self.step) * self.step
        n = int(np.clip(min(rounded, self.most), self.low, self.high))
        return {name: part * n for name, part in self.parts.items()}


def limits(
    groups: Sequence[Group],
    *,
    round_to: int = 1,
    min_keep: MinKeep = 1,
    min_ratio: float = 0.0,
    overrides: Mapping[str, float] | None = None,
    ignore: Sequence[str] = (),
) -> Limits:
    """The least and the largest legal count of each group.

    Args:
      round_to: counts are multiples of it, rounded up, or the group's whole size.
      min_keep, min_ratio: each group keeps at least this number and this share; a
        mapping {name pattern: number} sets it for the groups it matches, the first
        pattern deciding.
      overrides: {name pattern: share kept}; fixes the groups it matches. Patterns are
        those of fnmatch ("block*/conv1"); the first that matches decides.
      ignore: patterns of groups that are kept whole.

    Raises:
      ConfigError: an option out of range, or an override below the floor.
      PlanError: a pattern that matches no group.
    """
    given = {
        "round_to": round_to, "min_keep": min_keep, "min_ratio": min_ratio,
        "overrides": overrides, "ignore": ignore,
    }  # fmt: skip
    check_values(given, LIMIT_RULES)
    overrides = dict(overrides or {})
    floors = min_keep if isinstance(min_keep, Mapping) else {"*": min_keep}
    names = [g.name for g in groups]
    patterns = (*overrides, *ignore, *(p for p in floors if p != "*"))
    lost = [p for p in patterns if not fnmatch.filter(names, p)]
    if lost:
        raise PlanError(
            f"no group matches {lost}; the groups are {names[:8]}"
            f"{' ...' if len(names) > 8 else ''}"
        )
    low, high = {}, {}
    for group in groups:
        size = group.size

        def rounded(count: float, size: int = size) -> int:
            # 1e-9: 0.3 * 10 is 3.0000000000000004 in floating point.
            whole = math.ceil(max(count, 1) - 1e-9)
            return min(math.ceil(whole / round_to) * round_to, size)

        floor = next(
            (k for p, k in floors.items() if fnmatch.fnmatch(group.name, p)), 1
        )
        low[group.name] = rounded(max(floor, min_ratio * size))
        high[group.name] = size
        if any(fnmatch.fnmatch(group.name, p) for p in ignore):
            low[group.name] = size
            continue
        for pattern, ratio in overrides.items():
            if fnmatch.fnmatch(group.name, pattern):
                fixed = rounded(round(ratio * size))
                if fixed < low[group.name]:
                    raise ConfigError(
                        f"overrides={{{pattern!r}: {ratio}}} keeps {fixed} of {size} "
                        f"channels of group {group.name!r}, but min_keep={min_keep} "
                        f"and min_ratio={min_ratio} at least {low[group.name]}; raise "
                        f"the one or lower the other (min_keep={{{group.name!r}: "
                        f"{fixed}, '*': ...}})"
                    )
                low[group.name] = high[group.name] = fixed
                break
    links = _links(groups, low, high, round_to)
    for link in links:
        low.update(link.at(link.low))
        high.update(link.at(link.high))
    return Limits(low, high, round_to, links)


def _links(
    groups: Sequence[Group], low: Mapping[str, int], high: Mapping[str, int], step: int
) -> tuple[Link, ...]:
    sets: dict[str, list[Group]] = {}
    for group in groups:
        if group.linked:
            sets.setdefault(group.linked, []).append(group)
    found = []
    for members in sets.values():
        most = math.gcd(*(group.size for group in members))
        parts = {group.name: group.size // most for group in members}
        every = math.lcm(*(step // math.gcd(step, part) for part in parts.values()))
        least = max(math.ceil(low[name] / part) for name, part in parts.items())
        least = min(math.ceil(least / every) * every, most)
        largest = min(high[name] // part for name, part in parts.items())
        found.append(Link(parts, least, max(least, largest), every, most))
    return tuple(found)


def places(sizes: Iterable[int]) -> np.ndarray:
    """Of each channel its place in its group, between 0 and 1: by it groups lose alike
    shares where all values are equal."""
    found = [(np.arange(size) + 0.5) / size for size in sizes]
    return np.concatenate(found) if found else np.zeros(0)


def fit(groups, priorities, cost, limit: float, bounds: Limits) -> dict[str, int]:
    """Counts of the longest affordable top of the priority list, then filled up."""
    sizes = {g.name: g.size for g in groups}
    names = list(sizes)
    owner = np.repeat(np.arange(len(names)), [sizes[n] for n in names])
    values = np.concatenate([priorities[n] for n in names]) if names else np.zeros(0)
    order = owner[np.lexsort((owner, places(sizes.values()), -values))]

    def counts(top: int) -> dict[str, int]:
        taken = np.bincount(order[:top], minlength=len(names))
        wanted = {n: int(k) for n, k in zip(names, taken, strict=True)}
        return bounds.all_legal(wanted, sizes)

    least = counts(0)
    floor = cost(least)
    if floor > limit:
        raise BudgetError(
            f"the budget of {limit:.6g} cannot be met: with every group at its "
            f"smallest legal count the cost is {floor:.6g}; ask for at least that, or "
            "relax round_to, min_keep, min_ratio, overrides or ignore"
        )
    affordable, beyond = 0, order.size + 1
    while beyond - affordable > 1:
        middle = (affordable + beyond) // 2
        if cost(counts(middle)) <= limit:
            affordable = middle
        else:
            beyond = middle
    return _filled(counts(affordable), sizes, priorities, cost, limit, bounds)


def _filled(counts, sizes, priorities, cost, limit: float, bounds: Limits):
    """Counts with single steps added, highest priority first, while they fit."""
    queue = []
    links = {name: link for link in bounds.links for name in link.parts}

    def push(name: str) -> None:
        if counts[name] < bounds.high[name]:
            group = links[name].parts if name in links else (name,)
            priority = np.mean([priorities[n][counts[n]] for n in group])
            heapq.heappush(queue, (-priority, list(sizes).index(name), name))

    firsts = {next(iter(link.parts)) for link in bounds.links}
    for name in sizes:
        if name not in links or name in firsts:
            push(name)
    for _ in range(FILL_CALLS):
        if not queue:
            break
        _, _, name = heapq.heappop(queue)
        if name in links:
            link = links[name]
            more = link.at(counts[name] // link.parts[name] + 1)
        else:
            more = {name: bounds.legal(name, counts[name] + 1, sizes[name])}
        if cost({**counts, **more}) <= limit:
            counts.update(more)
            push(name)
    return counts

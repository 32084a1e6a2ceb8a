"""What of a plan a model can follow: the groups that stay whole, and why."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxprune.alignment import Difference, axis_mask
from jaxprune.check import align
from jaxprune.errors import EmissionError
from jaxprune.graph import ChannelGraph, Site
from jaxprune.records import Plan
from jaxprune.running import arrays_at

# In so many layers a group is given up by itself; after that, in all that are left.
_LAYERS = 2
# Up to so many of those given up are tried again in pairs.
_DOUBTFUL = 6
# Raises EmissionError for a plan that cannot be followed.
Check = Callable[[ChannelGraph, Plan], Any]


def follow(
    graph: ChannelGraph, plan: Plan, check: Check | None = None, *, alike: bool = False
) -> tuple[Plan, dict[str, str]]:
    """The plan without the groups that the model cannot follow, and why they stay.

    Where the slim program first differs, one of the groups that meet there is given up,
    the one without which the rest gets furthest: heads and widths that only fit with
    others. Where no group meets, bisects over the groups that lose channels.

    Args:
      check: by default `align`.
      alike: give up the same groups of all layers at once.
    """
    trial = _Trial(graph, plan, check or align)
    changed = [n for n, kept in plan.items() if kept.size < plan.sizes[n]]
    learned = bool(graph.helped)
    failure = trial.failure_of(changed)
    if failure is not None and learned:
        # What is given up must not depend on the plans before this one.
        graph.helped.clear()
        graph.followed.clear()
        failure = trial.failure_of(changed)
    if failure is None:
        return trial.restricted(changed), {}
    good = trial.give_up(changed, failure, alike)
    if good is None:
        trial.reasons.clear()
        good = trial.grow([], changed, failure)
    return trial.restricted(good), trial.reasons


def fits(graph: ChannelGraph, plan: Plan) -> bool:
    """True if the model follows all of the plan."""
    try:
        align(graph, plan)
    except EmissionError:
        return False
    return True


def nearly(graph: ChannelGraph, plan: Plan, most: int) -> dict[str, str] | None:
    """The groups that the model cannot follow, alike in all layers, and why; None where
    they are of more than so many kinds."""
    trial = _Trial(graph, plan, align)
    changed = [n for n, kept in plan.items() if kept.size < plan.sizes[n]]
    good = trial.give_up(changed, trial.failure_of(changed), True, most)
    return None if good is None else trial.reasons


def kind_of(graph: ChannelGraph, name: str) -> tuple[str, int]:
    """What the groups of a name in all layers of a network have in common."""
    return re.sub(r"\d+", "#", name), graph.group(name).size


class _Trial:
    """A plan, of which subsets of the groups are tried; the reasons of those given up."""

    def __init__(self, graph: ChannelGraph, plan: Plan, check: Check):
        self.graph, self.plan, self.check = graph, plan, check
        self.reasons: dict[str, str] = {}
        self.masks: dict[str, np.ndarray] = {}
        self.last_sites: dict[str, Site] = {}

    def restricted(self, names: Sequence[str]) -> Plan:
        """The plan for these groups; the others are whole."""
        return self.graph.complete({name: self.plan[name] for name in names})

    def failure_of(self, names: Sequence[str]) -> EmissionError | None:
        try:
            self.check(self.graph, self.restricted(names))
        except EmissionError as error:
            return error
        return None

    def give_up(
        self,
        good: list[str],
        failure: EmissionError | None,
        alike: bool,
        most: int | None = None,
    ) -> list[str] | None:
        """The groups but for single ones at fault; None where none is found to be, or
        more than so many kinds are."""
        kinds: Counter[Any] = Counter()
        doubtful: list[list[str]] = []  # that got no further, and the one that then did
        stuck = False
        while isinstance(failure, Difference):
            if len(kinds) == most:
                return None
            best: tuple[Any, list[str], EmissionError | None] = ((), [], failure)
            for name in self._suspects(failure.site, good):
                wide = alike or kinds[kind_of(self.graph, name)] >= _LAYERS
                dropped = self._from(failure.site, name, good) if wide else [name]
                rest = [n for n in good if n not in dropped]
                error = self.failure_of(rest)
                site = error.site if isinstance(error, Difference) else ()
                # Of those that get equally far, the one without which most can go.
                left = self.graph.params(self.restricted(rest))
                rank = error is None, site, -left
                if not best[1] or rank > best[0]:
                    best = rank, dropped, error
            rank, dropped, error = best
            if not dropped:
                return None
            self.reasons.update(dict.fromkeys(dropped, str(failure)))
            further = error is None or rank[1] > failure.site
            if not further or stuck:
                doubtful.append(dropped)
            stuck = not further
            kinds[kind_of(self.graph, dropped[0])] += 1
            good, failure = [n for n in good if n not in dropped], error
        if failure is not None:
            return None
        return self._take_back(good, doubtful)

    def _take_back(self, good: list[str], doubtful: list[list[str]]) -> list[str]:
        """`good` with those that fit after all, singly or two together, because others
        were at fault."""
        for count in (1, 2) if len(doubtful) <= _DOUBTFUL else (1,):
            for sets in itertools.combinations(doubtful, count):
                names = [name for held in sets for name in held]
                if set(names) & set(good):
                    continue
                if self.failure_of([*good, *names]) is None:
                    good = [*good, *names]
                    for name in names:
                        del self.reasons[name]
        return good

    def grow(
        self,
        good: list[str],
        candidates: list[str],
        failure: EmissionError | None = None,
    ) -> list[str]:
        """`good` and those of the candidates that can be followed with them.

        failure: of all of them together, if it is known.
        """
        if not candidates:
            return good
        failure = failure or self.failure_of(good + candidates)
        if failure is None:
            return good + candidates
        if len(candidates) == 1:
            self.reasons[candidates[0]] = str(failure)
            return good
        half = len(candidates) // 2
        more = self.grow(good, candidates[:half])
        same = more == good + candidates[:half]
        return self.grow(more, candidates[half:], failure if same else None)

    def _from(self, site: Site, name: str, names: Sequence[str]) -> list[str]:
        """The group and its like in other layers, but for those that are last used
        before the site: they fit."""
        kind = kind_of(self.graph, name)
        like = (other for other in names if kind_of(self.graph, other) == kind)
        return [o for o in like if o == name or self._last_site(o) >= site]

    def _last_site(self, name: str) -> Site:
        if name not in self.last_sites:
            sites = sorted(self.graph.records, reverse=True)
            self.last_sites[name] = next((s for s in sites if self._meets(name, s)), ())
        return self.last_sites[name]

    def _meets(self, name: str, site: Site) -> bool:
        """Whether channels of the group are used at the site."""
        record = self.graph.records.get(site)
        values = () if record is None else (*record.inputs, *record.outputs)
        if name not in self.masks:
            self.masks[name] = self.graph.unit_mask(self.restricted([name]))
        return any(
            not axis_mask(self.graph, self.masks[name], axis).all()
            for value in values
            for axis in value.axes
            if axis is not None
        )

    def _suspects(self, site: Site, names: Sequence[str]) -> list[str]:
        """Groups whose channels are used at the site; where there is none, those that
        lie in the same modules."""
        found = [name for name in names if self._meets(name, site)]
        if found:
            return found
        modules = {_module(path) for path in arrays_at(self.graph, site)}
        paths = {g.name: {_module(s.path) for s in g.slots} for g in self.graph.groups}
        return [name for name in names if modules & paths[name]]


def _module(path: str) -> str:
    """The module that a layer's array lies in: two steps up."""
    return "/".join(path.removeprefix("params/").split("/")[:-2])

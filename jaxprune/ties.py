"""Which groups the model's source can follow, and which only together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jaxprune.following import fits, follow, kind_of, nearly
from jaxprune.graph import ChannelGraph, build
from jaxprune.records import Group, Plan

# Why groups are left alone that others depend on.
_WHOLE = "it stays whole, so that widths which the source derives can follow"


class Settled(NamedTuple):
    """What `settled` finds.

    Attributes:
      graph: with groups tied.
      marks: {group: mark of its set} of groups that shrink only at alike shares.
      stuck: {group: why it cannot shrink}.
    """

    graph: ChannelGraph
    marks: Mapping[str, str]
    stuck: Mapping[str, str]


def settled(graph: ChannelGraph, together: bool) -> Settled:
    """Groups that shrink only alike, or at alike shares, and those that cannot.

    Args:
      together: counts are chosen for all groups at once, so that some can be linked.
    """
    halves = _halves(graph)
    guess = None if not together or fits(graph, halves) else _guess(graph, halves)
    if guess is not None:
        return guess
    graph, stuck = _tied(graph, halves)
    marks = {}
    if together and stuck:
        marks, stuck = _linked(graph, stuck)
    return Settled(graph, marks, stuck)


def _guess(graph: ChannelGraph, halves: Plan) -> Settled | None:
    """What `settled` returns, if it holds for the whole network with the heads whole,
    which a few plans show: a search for what is at fault takes many. None if not."""
    tried: list[list[_Link]] = [[]]
    refused: list[set[str]] = []
    for choice in _CHOICES:
        if (links := _products(graph, halves, choice)) in tried:
            continue
        tried.append(links)
        stuck = dict.fromkeys((n for link in links for n in link.whole), _WHOLE)
        if stuck.keys() in refused:
            continue
        rest = {n: kept for n, kept in halves.items() if n not in stuck}
        if (left := nearly(graph, graph.complete(rest), _FEW)) is None:
            refused.append(set(stuck))
            continue
        stuck.update(left)
        links = [link for link in links if not link.names & left.keys()]
        probe = _probe(graph, stuck)
        if fits(graph, graph.complete(probe)):
            # Where others are at fault, the heads may be none of it.
            return None if left else Settled(graph, {}, stuck)
        sets = _sisters(graph, [name for link in links for name in link.names])
        probe.update({name: probe[names[0]] for names in sets for name in names})
        if sets and fits(graph, graph.complete(probe)):
            return Settled(_with_ties(graph, sets), {}, stuck)
        if links and fits(graph, _shares(graph, stuck, links)):
            return Settled(graph, _marks(links), stuck)
    return None


def _sisters(graph: ChannelGraph, names: Iterable[str]) -> list[list[str]]:
    """Those of the groups that lie in one module and have one size, by twos and more."""
    sets: dict[tuple[str, int], list[str]] = {}
    for name in names:
        key = name.rpartition("/")[0], graph.group(name).size
        sets.setdefault(key, []).append(name)
    return [members for members in sets.values() if len(members) > 1]


def _with_ties(graph: ChannelGraph, tied: Iterable[Sequence[str]]) -> ChannelGraph:
    return build(
        graph.handle,
        graph.variables,
        graph.inputs,
        ignore=graph.ignore,
        outputs=graph.outputs,
        tied=[*graph.tied, *tied],
    )


def _tied(graph: ChannelGraph, halves: Plan) -> tuple[ChannelGraph, dict[str, str]]:
    """The graph with groups tied that shrink only alike, and the groups that cannot.

    A source that states one number for the widths of queries, keys and values follows a
    plan only if all of them keep as many channels: they become one group. Found with two
    plans, one that halves every group, one in which all keep another number.

    Returns:
      The graph, and {group: why it cannot shrink}.
    """
    _, stuck = follow(graph, halves)
    dependent = _dependent(graph, stuck)
    sets = _sisters(graph, dependent)
    if not sets:
        return graph, {**stuck, **dependent}
    graph = _with_ties(graph, sets)
    _, stuck = follow(graph, _halves(graph))
    stuck = {**stuck, **_dependent(graph, stuck)}
    for names in graph.tied:
        why = next((stuck[name] for name in names if name in stuck), None)
        stuck.update(dict.fromkeys(names, why) if why else {})
    return graph, stuck


def _linked(
    graph: ChannelGraph, stuck: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Groups that shrink only at alike shares, and those that still cannot shrink.

    A source that cuts an array by `width // heads`, the width read off its input, follows
    where the heads stay and their width keeps the share that the input keeps. Proposed
    for two groups of an array whose sizes' product is that of a third, on another axis:
    one of the two stays whole, the smaller if that works; and for groups of one size on
    two axes (one head). Found to hold with one more plan, in which every set keeps a
    share of its own.

    Args:
      stuck: of `_tied`.

    Returns:
      {group: mark of its set}, and {group: why it cannot shrink} without them.
    """
    for choice in _CHOICES:
        links = _products(graph, stuck, choice)
        if not links:
            continue
        _, left = follow(graph, _shares(graph, stuck, links), alike=True)
        held = [link for link in links if not link.names & left.keys()]
        if held:
            whole = dict.fromkeys((n for link in held for n in link.whole), _WHOLE)
            marks, others = _marks(held), {**whole, **left, **stuck}
            free = marks.keys() | {
                n for names in graph.tied if marks.keys() & names for n in names
            }
            return marks, {n: why for n, why in others.items() if n not in free}
    return {}, dict(stuck)


class _Link(NamedTuple):
    """Groups that might follow together where some stay whole."""

    names: set[str]
    whole: set[str]


class _Choice(NamedTuple):
    """Which links are proposed.

    Attributes:
      larger: of two groups the larger stays whole, not the smaller.
      across: the two may lie on two axes of the array.
      equal: groups of equal size on two axes are linked too.
    """

    larger: bool = False
    across: bool = False
    equal: bool = False


_CHOICES = _Choice(), _Choice(equal=True), _Choice(across=True), _Choice(larger=True)
# Kinds of groups that a guess may leave whole.
_FEW = 4


def _marks(links: Iterable[_Link]) -> dict[str, str]:
    return {name: min(link.names) for link in links for name in link.names}


def _shares(
    graph: ChannelGraph, stuck: Collection[str], links: Sequence[_Link]
) -> Plan:
    """A plan in which every set keeps a share of its own; the others keep other counts,
    but for those that stay whole."""
    names = {name for link in links for name in link.names}
    keep = _probe(graph, set(stuck) - names)
    for number, link in enumerate(links):
        sizes = {name: graph.group(name).size for name in link.names}
        most = math.gcd(*sizes.values())
        n = max(1, most // 2 - 1 - number % max(1, most // 4))
        keep.update({k: np.arange(size // most * n) for k, size in sizes.items()})
        keep.update({k: np.arange(graph.group(k).size) for k in link.whole})
    return graph.complete(keep)


def _products(
    graph: ChannelGraph, among: Collection[str], choice: _Choice
) -> list[_Link]:
    """Links between groups `among` these."""
    on: dict[str, dict[str, set[int]]] = {}
    for group in graph.groups:
        for slot in group.slots:
            axes = on.setdefault(slot.path, {}).setdefault(group.name, set())
            axes.add(slot.axis)
    sizes = {group.name: group.size for group in graph.groups}

    def factors(axes: Mapping[str, set[int]]) -> Iterator[tuple[int, str, set[str]]]:
        """(size, group that changes, groups that stay) of what an axis may consist of."""
        yield from ((sizes[name], name, set()) for name in axes)
        for pair in itertools.combinations(axes, 2):
            if choice.across or axes[pair[0]] & axes[pair[1]]:
                low, high = sorted(pair, key=lambda name: sizes[name])
                part, keep = (low, high) if choice.larger else (high, low)
                yield sizes[part] * sizes[keep], part, {keep}

    links: list[_Link] = []
    for axes in on.values():
        found = list(factors(axes))
        for (one, a, keep), (two, b, others) in itertools.combinations(found, 2):
            names, whole = {a, b}, keep | others
            if one != two or a == b or whole & names or not (whole or choice.equal):
                continue
            if names.issubset(among):
                met = [link for link in links if link.names & names]
                links = [link for link in links if link not in met]
                names.update(*(link.names for link in met))
                whole = whole.union(*(link.whole for link in met))
                links.append(_Link(names, whole))

    def can_shrink(link: _Link) -> bool:
        sizes = (graph.group(name).size for name in link.names)
        return math.gcd(*sizes) > 1 and not any(link.names & o.whole for o in links)

    return [link for link in links if can_shrink(link)]


def untied(graph: ChannelGraph, tied: ChannelGraph, plan: Plan) -> Plan:
    """The plan of a graph with groups tied, by the groups of the graph without."""
    kept = dict(plan)
    for names in tied.tied:
        lead = next(name for name in names if name in plan)
        kept.update({name: plan[lead] for name in names})
    return graph.complete(kept)


def _halves(graph: ChannelGraph) -> Plan:
    return graph.complete(
        {g.name: np.arange(max(1, g.size // 2)) for g in graph.groups}
    )


def _dependent(graph: ChannelGraph, stuck: dict[str, str]) -> dict[str, str]:
    """Groups that cannot shrink where the others keep other numbers of channels.

    Layers alike keep as many, but for the last of them: so the search for the numbers
    that follow is one for all layers.
    """
    _, left = follow(graph, graph.complete(_probe(graph, stuck)), alike=True)
    return left


def _probe(graph: ChannelGraph, stuck: Container[str]) -> dict[str, np.ndarray]:
    """What groups keep to find those that fit one plan: alike in layers alike."""
    groups = [group for group in graph.groups if group.name not in stuck]
    kinds: dict[Any, list[Group]] = {}
    for group in groups:
        kinds.setdefault(kind_of(graph, group.name), []).append(group)
    counts = {}
    for number, alike in enumerate(kinds.values()):
        for group in alike:
            another = group is alike[-1] and len(alike) > 1
            least = 2 if group.size > 3 else 1  # one channel alone broadcasts otherwise
            counts[group.name] = least + (number + another) % (group.size - least)
    return {name: np.arange(count) for name, count in counts.items()}

"""Which groups the model's source can follow, and which only together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterator, Mapping
from typing import Any

import numpy as np

from jaxprune.following import follow, kind_of
from jaxprune.graph import ChannelGraph, build
from jaxprune.records import Group, Plan


def settled(graph: ChannelGraph) -> tuple[ChannelGraph, dict[str, str]]:
    """The graph with groups tied that shrink only alike, and the groups that cannot.

    A source that states one number for the widths of queries, keys and values follows a
    plan only if all of them keep as many channels: they become one group. Found with two
    plans, one that halves every group, one in which all keep another number.

    Returns:
      The graph, and {group: why it cannot shrink}.
    """
    _, stuck = follow(graph, _halves(graph))
    dependent = _dependent(graph, stuck)
    sets: dict[tuple[str, int], list[str]] = {}
    sizes = {group.name: group.size for group in graph.groups}
    for name in dependent:
        sets.setdefault((name.rpartition("/")[0], sizes[name]), []).append(name)
    tied = [names for names in sets.values() if len(names) > 1]
    if not tied:
        return graph, {**stuck, **dependent}
    graph = build(
        graph.handle,
        graph.variables,
        graph.inputs,
        ignore=graph.ignore,
        outputs=graph.outputs,
        tied=[*graph.tied, *tied],
    )
    _, stuck = follow(graph, _halves(graph))
    stuck = {**stuck, **_dependent(graph, stuck)}
    for names in graph.tied:
        why = next((stuck[name] for name in names if name in stuck), None)
        stuck.update(dict.fromkeys(names, why) if why else {})
    return graph, stuck


def linked(
    graph: ChannelGraph, stuck: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Groups that shrink only at alike shares, and those that still cannot shrink.

    A source that cuts an array by `width // heads`, the width read off its input, follows
    where the heads stay and their width keeps the share that the input keeps. Proposed
    for two groups on one axis of an array whose sizes' product is that of another axis:
    one of the two stays whole, the smaller if that works.
    Found to hold with one more plan, in which every set keeps a share of its own.

    Args:
      stuck: of `settled`.

    Returns:
      {group: mark of its set}, and {group: why it cannot shrink} without them.
    """
    for larger in (False, True):
        whole, sets = _products(graph, stuck, larger)
        if not sets:
            continue
        keep = _probe(graph, set(stuck).difference(*sets))
        for number, names in enumerate(sets):
            most = math.gcd(*(graph.group(name).size for name in names))
            n = max(1, most // 2 - 1 - number % max(1, most // 4))
            for name in names:
                keep[name] = np.arange(graph.group(name).size // most * n)
        for name in whole:
            keep.pop(name, None)
        _, left = follow(graph, graph.complete(keep), alike=True)
        held = [names for names in sets if not names & left.keys()]
        if held:
            marks = {name: min(names) for names in held for name in names}
            why = "it stays whole, so that widths which the source derives can follow"
            reasons = {name: stuck.get(name, why) for name in whole}
            others = {**stuck, **reasons, **left}
            return marks, {n: why for n, why in others.items() if n not in marks}
    return {}, dict(stuck)


def _products(
    graph: ChannelGraph, stuck: Mapping[str, str], larger: bool
) -> tuple[set[str], list[set[str]]]:
    """Groups to be kept whole, and sets of groups that then might follow together.

    Args:
      larger: of two groups on one axis the larger stays whole.
    """
    on: dict[tuple[str, int], list[Group]] = {}
    for group in graph.groups:
        for slot in group.slots:
            members = on.setdefault((slot.path, slot.axis), [])
            if group not in members:
                members.append(group)

    def factors(members: list[Group]) -> Iterator[tuple[int, str, set[str]]]:
        """(size, group that changes, groups that stay) of what an axis may consist of."""
        yield from ((group.size, group.name, set()) for group in members)
        for pair in itertools.combinations(members, 2):
            part, keep = sorted(pair, key=lambda group: group.size, reverse=not larger)
            yield part.size * keep.size, part.name, {keep.name}

    axes: dict[str, list[tuple[int, str, set[str]]]] = {}
    for (path, _), members in on.items():
        axes.setdefault(path, []).extend(factors(members))
    whole: set[str] = set()
    sets: list[set[str]] = []
    for found in axes.values():
        for (one, a, keep), (two, b, others) in itertools.combinations(found, 2):
            kept, joined = keep | others, {a, b}
            if one != two or not kept or a == b or kept & joined:
                continue
            if joined <= stuck.keys():
                whole |= kept
                joined.update(*(s for s in sets if s & joined))
                sets = [s for s in sets if not s & joined] + [joined]
    return whole, [names for names in sets if not names & whole]


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

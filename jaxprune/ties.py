"""Which groups the model's source can follow, and which only together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Container, Iterator, Mapping
from typing import Any, NamedTuple

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
    one of the two stays whole, the smaller if that works. Found to hold with one more
    plan, in which every set keeps a share of its own.

    Args:
      stuck: of `settled`.

    Returns:
      {group: mark of its set}, and {group: why it cannot shrink} without them.
    """
    for larger in (False, True):
        links = _products(graph, stuck, larger)
        names = {name for link in links for name in link.names}
        keep = _probe(graph, stuck.keys() - names)
        for number, link in enumerate(links):
            sizes = {name: graph.group(name).size for name in link.names}
            most = math.gcd(*sizes.values())
            n = max(1, most // 2 - 1 - number % max(1, most // 4))
            keep.update({k: np.arange(size // most * n) for k, size in sizes.items()})
            keep.update({k: np.arange(graph.group(k).size) for k in link.whole})
        _, left = follow(graph, graph.complete(keep), alike=True) if links else ({}, {})
        held = [link for link in links if not link.names & left.keys()]
        if held:
            why = "it stays whole, so that widths which the source derives can follow"
            reasons = {name: why for link in held for name in link.whole}
            marks = {name: min(link.names) for link in held for name in link.names}
            others = {**reasons, **left, **stuck}
            return marks, {n: why for n, why in others.items() if n not in marks}
    return {}, dict(stuck)


class _Link(NamedTuple):
    """Groups that might follow together where some stay whole."""

    names: set[str]
    whole: set[str]


def _products(
    graph: ChannelGraph, stuck: Mapping[str, str], larger: bool
) -> list[_Link]:
    """What `linked` tries; of two groups on one axis the `larger` stays whole, or the
    smaller."""
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
    links: list[_Link] = []
    for found in axes.values():
        for (one, a, keep), (two, b, others) in itertools.combinations(found, 2):
            names, whole = {a, b}, keep | others
            if one != two or not whole or a == b or whole & names:
                continue
            if names <= stuck.keys():
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

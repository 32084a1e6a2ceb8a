"""Which groups the model's source can follow, and which only together."""

from __future__ import annotations

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
    groups = [group for group in graph.groups if group.name not in stuck]
    kinds: dict[Any, list[Group]] = {}
    for group in groups:
        kinds.setdefault(kind_of(graph, group.name), []).append(group)
    counts = {}
    for number, alike in enumerate(kinds.values()):
        for group in alike:
            another = group is alike[-1] and len(alike) > 1
            counts[group.name] = 1 + (number + another) % (group.size - 1)
    plan = graph.complete({name: np.arange(count) for name, count in counts.items()})
    _, left = follow(graph, plan, alike=True)
    return left

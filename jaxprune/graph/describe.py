"""The channel graph in words: `print(graph)` and `graph.explain(path)`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jaxprune.errors import GraphError
from jaxprune.graph.rules.contraction import WINDOW

if TYPE_CHECKING:
    from jaxprune.graph.graph import ChannelGraph
    from jaxprune.records import Group, Slot


def describe(graph: ChannelGraph) -> str:
    """Groups with sizes and members, costs, and what is frozen and why."""
    sizes = f"{len(graph.groups)} groups, {graph.channels.count} channels"
    costs = f"{graph.macs():,} MACs, {graph.params():,} parameters"
    lines = [f"ChannelGraph: {sizes}, {costs}"]
    rows = _rows(graph.groups)
    width = max((len(name) for name, _, _ in rows), default=0)
    lines += [f"  {name:<{width}}  {size:>5}  {text}" for name, size, text in rows]
    frozen = _frozen_lines(graph)
    lines += ["frozen:", *frozen] if frozen else []
    for name, where in graph.unknown.items():
        lines.append(f"no rule for {name!r} at {where}: all it touches is frozen")
    return "\n".join(lines)


# Groups that differ in the numbers of their names alone share one line from here on.
_REPEATED = 3


def _rows(groups: Sequence[Group]) -> list[tuple[str, int, str]]:
    """(name, size, members) a line; repeated blocks are one line, numbers as `*`."""
    alike: dict[tuple[str, int, str], list[Group]] = {}
    for group in groups:
        key = (_template(group.name), group.size, _template(_members(group)))
        alike.setdefault(key, []).append(group)
    rows = []
    for (_, size, members), found in alike.items():
        if len(found) < _REPEATED:
            rows += [(group.name, size, _members(group)) for group in found]
        else:
            name = f"{found[0].name} .. {found[-1].name} ({len(found)} groups)"
            rows.append((name, size, members))
    return rows


def _template(text: str) -> str:
    return re.sub(r"\d+", "*", text)


def _members(group: Group) -> str:
    made = [slot.path for slot in group.producers]
    read = [slot.path for slot in group.consumers]
    return f"made by {_few(made)}; read by {_few(read)}"


def _few(paths: list[str], most: int = 3) -> str:
    names = list(dict.fromkeys(path.removeprefix("params/") for path in paths))
    if not names:
        return "nothing"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _frozen_lines(graph: ChannelGraph) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for item in graph.frozen:
        if item.reason.endswith(WINDOW):
            continue  # every kernel has window axes; nobody asks why
        place = f"{item.path.removeprefix('params/')} axis {item.axis}"
        by_reason.setdefault(item.reason, []).append(place)
    return [f"  {_few(places)}: {why}" for why, places in by_reason.items()]


def explain(graph: ChannelGraph, path: str) -> str:
    """One paragraph an axis of the leaf: what it is tied to, or why it is frozen."""
    if path not in graph.leaves:
        near = [name for name in graph.leaves if path in name]
        raise GraphError(
            f"the model has no leaf {path!r}; "
            f"{'did you mean' if near else 'its leaves are named like'} "
            f"{(near or list(graph.leaves))[:5]}"
        )
    lines = []
    for dim, axis in enumerate(graph.leaves[path].axes):
        if axis is None:
            continue
        reasons = [f for f in graph.frozen if (f.path, f.axis) == (path, dim)]
        if reasons:
            lines.append(
                f"{path} axis {dim} ({axis.size}) is frozen: {reasons[0].reason}."
            )
            continue
        for group in graph.groups:
            mine = [s for s in group.slots if (s.path, s.axis) == (path, dim)]
            if not mine:
                continue
            each = mine[0].index.shape[1]
            others = _places([slot for slot in group.slots if slot is not mine[0]])
            lines.append(
                f"{path} axis {dim} ({axis.size}) belongs to group {group.name!r} of "
                f"{group.size} channels, {each} indices a channel, as {mine[0].role}; "
                f"it goes together with {others or 'nothing else'}."
            )
    return "\n".join(lines) or f"{path} has no axis that could hold channels."


def _places(slots: Sequence[Slot]) -> str:
    """The slots by name; those of repeated blocks as one, numbers as `*`."""
    alike: dict[str, list[str]] = {}
    for slot in slots:
        place = f"axis {slot.axis} ({slot.role})"
        key = f"{_template(slot.path)} {place}"
        alike.setdefault(key, []).append(f"{slot.path} {place}")
    parts = []
    for key, found in alike.items():
        several = [f"{key} in {len(found)} places"]
        parts += found if len(found) < _REPEATED else several
    return ", ".join(parts)

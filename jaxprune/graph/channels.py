"""From classes of nodes to channels and groups: who belongs together, and where."""

# JAX types `aval` as its base class, which has no shape.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from jaxprune.errors import GraphError
from jaxprune.graph.atoms import Atoms, Classes
from jaxprune.graph.interpret import Record, Value
from jaxprune.graph.rules.contraction import product_dims
from jaxprune.records import Group, Role, Slot

Place = tuple[str, int]


@dataclass(eq=False)
class Leaves:
    """Where the nodes of the variables' leaves start, to find a node's owner."""

    places: list[Place]
    starts: np.ndarray
    stop: int

    @classmethod
    def of(cls, values: Mapping[str, Value], stop: int) -> Leaves:
        found = [
            (axis[0], (path, dim))
            for path, value in values.items()
            for dim, axis in enumerate(value.axes)
            if axis is not None
        ]
        found.sort()
        starts = np.array([start for start, _ in found], np.int64)
        return cls([place for _, place in found], starts, stop)

    def owners(self, nodes: np.ndarray) -> set[Place]:
        own = nodes[nodes < self.stop]
        rows = np.unique(np.searchsorted(self.starts, own, side="right") - 1)
        return {self.places[row] for row in rows}


def base_nodes(atoms: Atoms, axis: np.ndarray) -> np.ndarray:
    """The nodes of an axis with products replaced by their factors."""
    products = atoms.products
    if not products.size:
        return axis
    rows = dict(zip(products[0].tolist(), range(products.shape[1]), strict=True))
    seen, queue = set(), [int(node) for node in np.unique(axis)]
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        row = rows.get(node)
        if row is not None:
            queue += [int(products[1, row]), int(products[2, row])]
    return np.array(sorted(seen), np.int64)


def roles(
    atoms: Atoms, records: Sequence[Record], leaves: Leaves
) -> tuple[dict[Place, Role], dict[Place, int]]:
    """Role of every kernel axis, and the number of the record that first uses it.

    A kernel is an operand of a contraction that depends on the variables alone;
    its contracted axes consume, its other axes produce. The features of a gathered
    table (an embedding) produce too. An axis that does both (a tied embedding)
    counts as a producer: zeroing it would silence both uses.

    Where both operands depend on the variables alone (learned positions through a
    Dense, the factors of a kernel of low rank), the second is the kernel and the first
    what it reads, as far as no other use says more.
    """
    found: dict[Place, Role] = {}
    first: dict[Place, int] = {}
    among_variables: list[tuple[Value, Sequence[int], Role, int]] = []

    def places(value: Value, dims: Sequence[int]) -> Iterator[Place]:
        for axis in (value.axes[dim] for dim in dims):
            if axis is not None:
                yield from leaves.owners(base_nodes(atoms, axis))

    def mark(value: Value, dims: Sequence[int], role: Role, number: int) -> None:
        for place in places(value, dims):
            first.setdefault(place, number)
            if found.get(place) != "producer":
                found[place] = role

    for number, record in enumerate(records):
        if record.name in ("dot_general", "ragged_dot_general"):
            contract, batch, groups = product_dims(record.eqn)
            pure = [value.pure for value in record.inputs[:2]]
            for side, value in enumerate(record.inputs[:2]):
                used = {*contract[side], *batch[side], *(groups if side else ())}
                free = [d for d in range(len(value.axes)) if d not in used]
                if all(pure):
                    role: Role = "consumer" if side else "producer"
                    among_variables.append((value, contract[side], role, number))
                    if side:
                        among_variables.append((value, free, "producer", number))
                elif value.pure:
                    mark(value, contract[side], "consumer", number)
                    mark(value, free, "producer", number)
        elif record.name == "conv_general_dilated":
            kernel = record.inputs[1]
            spec = record.eqn.params["dimension_numbers"].rhs_spec
            if kernel.pure:
                grouped = record.eqn.params["feature_group_count"] > 1
                depthwise = grouped and record.eqn.invars[1].aval.shape[spec[1]] == 1
                mark(kernel, [spec[1]], "consumer", number)
                mark(kernel, [] if depthwise else [spec[0]], "producer", number)
        elif record.name == "gather" and record.inputs[0].pure:
            mark(
                record.outputs[0],
                range(len(record.outputs[0].axes)),
                "producer",
                number,
            )
    for value, dims, role, number in among_variables:
        for place in places(value, dims):
            if place not in found:
                found[place], first[place] = role, number
    return found, first


@dataclass(eq=False)
class Channels:
    """The channels of a graph.

    Attributes:
      groups: in the order in which the network first produces them.
      unit_of: int array (classes,), the channel of each class, or -1.
      places: {(path, axis): int array (n, F)}, the channels each index needs, -1
        where it needs fewer; only axes on which something can go.
    """

    groups: tuple[Group, ...]
    unit_of: np.ndarray
    places: dict[Place, np.ndarray]

    @property
    def count(self) -> int:
        return int(self.unit_of.max(initial=-1)) + 1


def build(
    classes: Classes,
    values: Mapping[str, Value],
    role_of: Mapping[Place, Role],
    first_use: Mapping[Place, int],
    named: Sequence[Group] = (),
) -> Channels:
    """Groups of channels with the same slots and the same part in each reshape.

    Args:
      named: the groups before some of them were tied, whose names they keep; those
        that were tied have the name of the first of them.
    """
    late = max(first_use.values(), default=0) + 1
    axes = {
        (path, dim): axis
        for path, value in values.items()
        for dim, axis in enumerate(value.axes)
        if axis is not None
    }
    places, sizes = list(axes), [axis.size for axis in axes.values()]
    needs = classes.needs(np.concatenate([*axes.values(), np.zeros(0, np.int64)]))
    table = _entries(needs, sizes)
    unit_of = np.full(int(classes.label.max(initial=-1)) + 1, -1, np.int64)
    found = []
    for labels, rows in _alike(table, classes):
        if len(labels) < 2:
            continue
        slots = _slots(table, rows, places, role_of)
        if all(slot.role == "consumer" for slot in slots):
            continue  # copies (tile, repeat) and constants: no variable makes them
        slots.sort(key=lambda s: first_use.get((s.path, s.axis), late))
        lead = next((s for s in slots if s.role == "producer"), slots[0])
        order = np.argsort(lead.index[:, 0], kind="stable")
        slots = tuple(Slot(s.path, s.axis, s.index[order], s.role) for s in slots)
        start = min(first_use.get((s.path, s.axis), late) for s in slots)
        found.append((start, lead, slots, labels[order]))
    found.sort(key=lambda item: (item[0], item[1].path, item[1].axis))
    groups, count = [], 0
    known = {_mark(slot): group.name for group in named for slot in group.slots}
    taken = set(known.values())
    for _, lead, slots, labels in found:
        units = np.arange(count, count + labels.size)
        count += labels.size
        unit_of[labels] = units
        marks = map(_mark, slots) if known else ()
        name = next((known[mark] for mark in marks if mark in known), None)
        name = name or _name(lead, taken)
        groups.append(Group(name, labels.size, slots, units))
    units = np.append(unit_of, -1)[needs]
    stops = np.cumsum(sizes, dtype=np.int64)
    used = np.logical_or.reduceat(units >= 0, stops - sizes).any(1)
    widths = np.logical_or.reduceat(needs >= 0, stops - sizes).sum(1)
    free = {
        places[k]: units[stops[k] - sizes[k] : stops[k], : widths[k]]
        for k in np.flatnonzero(used)
    }
    return Channels(tuple(groups), unit_of, free)


def tie(
    atoms: Atoms, classes: Classes, channels: Channels, tied: Sequence[Sequence[str]]
) -> None:
    """Unites groups channel by channel, in place, before the atoms are solved anew.

    Raises:
      GraphError: there is no group of that name, or they differ in size.
    """
    groups = {group.name: group for group in channels.groups}
    for names in [tied] if isinstance(tied, str) else tied:
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise GraphError(
                "tied= expects sets of group names, [('a', 'b'), ...], found "
                f"{names!r} among them"
            )
        missing = [name for name in names if name not in groups]
        if missing:
            raise GraphError(
                f"tied= names no group {missing[0]!r}; the graph has {list(groups)[:12]}"
            )
        sizes = {name: groups[name].size for name in names}
        if len(set(sizes.values())) > 1:
            raise GraphError(
                f"tied= expects groups of one size, found {sizes}; only those can keep "
                "the same channels"
            )
        nodes = [_nodes(classes, channels, groups[name]) for name in names]
        for other in nodes[1:]:
            atoms.unite(nodes[0], other, "tied")


def _nodes(classes: Classes, channels: Channels, group: Group) -> np.ndarray:
    """A node of each channel of the group, int array (C,)."""
    label, first = np.unique(classes.label, return_index=True)
    node = dict(zip(channels.unit_of[label].tolist(), first.tolist(), strict=True))
    return np.array([node[unit] for unit in group.units.tolist()], np.int64)


class _Entries(NamedTuple):
    """Where classes are needed, sorted by class, then by place and index; (n,) each."""

    label: np.ndarray
    place: np.ndarray
    index: np.ndarray


def _entries(needs: np.ndarray, sizes: Sequence[int]) -> _Entries:
    """Of what the indices of all places need (n, F), for the sizes of the places."""
    flat = needs.ravel()
    needed = np.flatnonzero(flat >= 0)
    needed = needed[np.argsort(flat[needed], kind="stable")]
    row = needed // needs.shape[1]
    start = np.cumsum(sizes, dtype=np.int64) - sizes
    place = np.repeat(np.arange(len(sizes)), sizes)[row]
    return _Entries(flat[needed], place, row - start[place])


def _alike(
    table: _Entries, classes: Classes
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(labels (n,), their rows of the table (n, k)) of the classes that have as many
    indices in the same places and the same parts as factors; in order of first label."""
    node, first, second, _, block = classes.products
    of = classes.label[node]
    parts = []
    for factor, side in ((first, 0), (second, 1)):
        label = classes.label[factor]
        true = ~classes.frozen[of] & (of != label) & ~classes.frozen[label]
        parts.append(np.stack([label[true], 2 * block[true] + side], axis=1))
    tags = np.unique(np.concatenate(parts), axis=0)
    factors = _sequences(tags[:, 0], tags[:, 1])
    part = np.full(len(classes.frozen), -1, np.int64)
    part[factors.labels] = factors.number
    found = _sequences(table.label, table.place)
    both = found.number * (part.max(initial=-1) + 2) + part[found.labels]
    _, begins, number = np.unique(both, return_index=True, return_inverse=True)
    members = np.split(
        np.argsort(number, kind="stable"), np.cumsum(np.bincount(number))[:-1]
    )
    for k in np.argsort(begins):
        own = members[k]
        rows = found.starts[own, None] + np.arange(int(found.counts[own[0]]))
        yield found.labels[own], rows


class _Sequences(NamedTuple):
    """Each label's first row, number of rows, and the number of its sequence."""

    labels: np.ndarray
    starts: np.ndarray
    counts: np.ndarray
    number: np.ndarray


def _sequences(label: np.ndarray, value: np.ndarray) -> _Sequences:
    """Labels (n,), ascending, with equal sequences of values (n,)."""
    labels, starts, counts = np.unique(label, return_index=True, return_counts=True)
    number = np.empty(labels.size, np.int64)
    known = 0
    for count in np.unique(counts):
        mine = np.flatnonzero(counts == count)
        values = value[starts[mine, None] + np.arange(count)]
        # The channels of a layer follow each other: only the first of a run is sorted.
        begins = np.append(True, (values[1:] != values[:-1]).any(1))
        whole = values[begins].view(np.dtype((np.void, values.itemsize * count)))
        _, inverse = np.unique(whole.ravel(), return_inverse=True)
        number[mine] = known + inverse.ravel()[np.cumsum(begins) - 1]
        known += int(inverse.max()) + 1
    return _Sequences(labels, starts, counts, number)


def _slots(
    table: _Entries,
    rows: np.ndarray,
    places: Sequence[Place],
    role_of: Mapping[Place, Role],
) -> list[Slot]:
    """The slots of classes of equal places, for their rows (n, k) of the table."""
    slots, of = [], table.place[rows[0]]
    for number in np.unique(of):
        path, axis = places[number]
        index = table.index[rows[:, of == number]]
        slots.append(Slot(path, axis, index, role_of.get((path, axis), "other")))
    return slots


def _mark(slot: Slot) -> tuple[str, int, tuple[int, ...], bytes]:
    """What tells a group's part of an axis from others', in whatever order."""
    rows = slot.index[np.lexsort(slot.index.T[::-1])]
    return slot.path, slot.axis, rows.shape, rows.tobytes()


def _name(lead: Slot, taken: set[str]) -> str:
    """The layer that produces the group, made unique by axis, then by number."""
    parts = lead.path.split("/")
    if len(parts) > 1 and parts[0] == "params":
        parts = parts[1:]
    base = "/".join(parts[:-1] if len(parts) > 1 else parts)
    names = [base, f"{base}.{lead.axis}"]
    names += [f"{base}.{lead.axis}#{k}" for k in range(2, 2 + len(taken))]
    name = next(name for name in [*names, f"{base}#"] if name not in taken)
    taken.add(name)
    return name

"""The search for the numbers that modules state and that must follow a plan.

A source that reshapes to (batch, n, self.num_heads, self.head_dim) fails, or computes
something else, where its arrays are smaller. The slim program is then traced again with
one such attribute of the modules that run there changed in the proportion in which a
size shrank. A change is kept if the program now agrees with the original's further on;
in the end the whole of it must, which is the proof: the search itself proves nothing.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxprune.alignment import Difference, Literals, axis_mask, kept_shape
from jaxprune.graph import ChannelGraph, Site
from jaxprune.graph.interpret import is_user_file, source_places
from jaxprune.running import Place, arrays_at, names_read, running

# (path of a module, name of the attribute) -> number.
Numbers = Mapping[tuple[str, str], int]
# (path of a module, name of the attribute, number): rows of a handle's settings.
Rows = tuple[tuple[str, str, int], ...]
# (full, left) sizes of axes that shrink, in the order in which they are met.
Pairs = dict[tuple[int, int], None]

# Programs traced to get past one difference, and for one plan.
_TRIES, _TRIES_IN_ALL = 40, 400
# Equations after the difference whose sizes are looked at: of `x.reshape(...) + 1` none
# is bound if the reshape raises.
_AHEAD = 2


@dataclass(frozen=True)
class Attempt:
    """A slim program traced with some numbers changed.

    Attributes:
      literals: of the program, if it is the original's.
      error: how it differs, if it is not.
      places: of the user's frames at the difference, innermost first.
    """

    literals: Literals | None = None
    error: Difference | None = None
    places: tuple[Place, ...] = ()


Try = Callable[[Rows], Attempt]


def search(
    graph: ChannelGraph, mask: np.ndarray, attempt: Try
) -> tuple[Rows, Literals]:
    """The numbers with which the slim program is the original's, and its literals.

    Args:
      mask: bool array (units,), the channels kept.
      attempt: traces and compares the slim program with numbers changed.

    Raises:
      Difference: no numbers were found.
    """
    numbers, now = {}, attempt(())
    if now.error is not None and graph.followed:  # by the plan before this one
        other = attempt(rows(graph.followed))
        if _further(other, now, {_spot(now)}):
            numbers, now = dict(graph.followed), other
    tries, seen = 0, set()
    while now.error is not None:
        spot = _spot(now)
        seen.add(spot)
        pairs, idle = _sizes(graph, mask, now.error.site), set()
        changes = _changes(graph, now, numbers, pairs, idle)
        for changed in itertools.islice(changes, _TRIES):
            tries += 1
            found = attempt(rows(changed))
            better = _further(found, now, seen)
            graph.helped[_key(graph, now, changed, numbers, pairs)] = better
            if better and tries < _TRIES_IN_ALL:
                now, numbers = found, changed
                break
            if _spot(found) == spot and str(found.error) == str(now.error):
                idle.update(_differing(changed, numbers))
        else:
            graph.followed = dict(numbers)
            raise now.error
    needed = {key: n for key, n in numbers.items() if _shrinks(graph, mask, key[0])}
    if len(needed) < len(numbers):
        other = attempt(rows(needed))
        if other.error is None:
            numbers, now = needed, other
    graph.followed = dict(numbers)
    assert now.literals is not None
    return rows(numbers), now.literals


def _shrinks(graph: ChannelGraph, mask: np.ndarray, path: str) -> bool:
    """True if an array of the module, or below it, loses channels."""
    inside = f"{path}/" if path else ""
    return any(
        name.removeprefix("params/").startswith(inside)
        and not all(
            axis_mask(graph, mask, a).all() for a in value.axes if a is not None
        )
        for name, value in graph.leaves.items()
    )


def raised_at(error: Exception) -> tuple[Place, ...]:
    """Where in the user's source it was raised: the frames, innermost first."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [(f.filename, f.lineno or 0) for f in reversed(frames)]
    return tuple(place for place in places if is_user_file(place[0]))


def rows(numbers: Numbers) -> Rows:
    """As a handle's settings."""
    return tuple((*key, number) for key, number in numbers.items())


def _further(found: Attempt, now: Attempt, seen: set[Any]) -> bool:
    if found.error is None or now.error is None:
        return True
    if found.error.site != now.error.site:
        return found.error.site > now.error.site
    # What raises below one equation, in the body of a loop, shows no more than where;
    # it raises before the equation is there to differ.
    return bool(found.places and now.places) and _spot(found) not in seen


def _spot(attempt: Attempt) -> Any:
    assert attempt.error is not None
    return attempt.error.site, attempt.places[:1]


def _differing(a: Numbers, b: Numbers) -> set[tuple[str, str]]:
    return {key for key in {**a, **b} if a.get(key) != b.get(key)}


def _key(
    graph: ChannelGraph, now: Attempt, changed: Numbers, numbers: Numbers, pairs: Pairs
) -> Any:
    """What a change is known by: layers of one source and size answer alike."""
    assert now.error is not None
    touched = {path for path, _ in _differing(changed, numbers)}
    held = frozenset(
        (graph.numbers[path][0], name, number)
        for (path, name), number in changed.items()
        if path in touched
    )
    place = _places(graph, now)[:1] or now.error.site
    return place, tuple(pairs), held, len(touched) > 1


# What is tried ------------------------------------------------------------------------

Change = dict[tuple[str, str], int]


def _changes(
    graph: ChannelGraph,
    now: Attempt,
    numbers: Numbers,
    pairs: Pairs,
    idle: set[tuple[str, str]],
) -> Iterator[Numbers]:
    """Numbers to try, the likely ones first; none that failed in such a place before.

    Args:
      idle: numbers that were found to change nothing here, as they are found.
    """
    near, tried = _near(graph, now), {frozenset(numbers.items())}
    for known in (True, False):  # first what helped in such a place
        for change, wide in _likely(graph, near, numbers, pairs, idle):
            changed = {**numbers, **(_alike(graph, change) if wide else change)}
            changed = {
                (path, name): number
                for (path, name), number in changed.items()
                if graph.numbers[path][1][name] != number
            }
            held = frozenset(changed.items())
            helped = graph.helped.get(_key(graph, now, changed, numbers, pairs))
            if held not in tried and helped is (True if known else None):
                tried.add(held)
                yield changed


def _likely(
    graph: ChannelGraph,
    near: Mapping[str, list[str]],
    numbers: Numbers,
    pairs: Pairs,
    idle: set[tuple[str, str]],
) -> Iterator[tuple[Change, bool]]:
    """(change, whether all modules of the class change alike)"""
    for path in near:  # the module may have followed others of its class
        yield _as_stated(graph, numbers, path), False
    single = [
        c for path, names in near.items() for c in _single(graph, path, names, pairs)
    ]
    for wide in (True, False):
        for change in single:
            if not idle & change.keys():
                yield change, wide
    for wide in (True, False):
        for a, b in itertools.combinations(single, 2):
            (one,), (two,) = a, b
            if one != two and one[0] == two[0] and not idle & {one, two}:
                yield {**a, **b}, wide


def _as_stated(graph: ChannelGraph, numbers: Numbers, path: str) -> Change:
    stated = graph.numbers[path][1]
    return {key: stated[key[1]] for key in numbers if key[0] == path}


def _single(
    graph: ChannelGraph, path: str, names: list[str], pairs: Pairs
) -> list[Change]:
    """Changes of one number of a module: those that equal a size that shrinks, then
    those in proportion to one."""
    stated = graph.numbers[path][1]
    exact, scaled = [], []
    for name in names:
        value = stated[name]
        for new in _values(value, pairs):
            (exact if (value, new) in pairs else scaled).append({(path, name): new})
    return exact + scaled


def _alike(graph: ChannelGraph, change: Change) -> Change:
    """The same change in all modules of the class that state the same number."""
    found = dict(change)
    for (path, name), new in change.items():
        kind, stated = graph.numbers[path]
        for other, (other_kind, others) in graph.numbers.items():
            if other_kind is kind and others.get(name) == stated[name]:
                found[other, name] = new
    return found


def _values(value: int, pairs: Pairs) -> list[int]:
    """What a number may become where sizes shrink from `full` to `left`."""
    new = (value * left // full for full, left in pairs if not value * left % full)
    return list(dict.fromkeys([*(n for n in new if n > 0), value]))


def _sizes(graph: ChannelGraph, mask: np.ndarray, site: Site) -> Pairs:
    """(full, left) of the axes that shrink in the equations at the site."""
    found: Pairs = {}
    ahead = {(*site[:-1], site[-1] + k) for k in range(_AHEAD + 1)} if site else set()
    for where, record in graph.records.items():
        if where[: len(site)] not in ahead:
            continue
        atoms = [*record.eqn.outvars, *record.eqn.invars]
        for atom, value in zip(atoms, [*record.outputs, *record.inputs], strict=True):
            full = tuple(atom.aval.shape)
            left = kept_shape(graph, mask, value.axes, full)
            for pair in zip(full, left, strict=True):
                if pair[0] != pair[1]:
                    found[pair] = None
    return found


# Where --------------------------------------------------------------------------------


def _near(graph: ChannelGraph, now: Attempt) -> dict[str, list[str]]:
    """Of each class that runs at the difference, innermost first: the module that is
    the likeliest, by path, and the names of the numbers that are read there; and
    likewise its parts, whose numbers it may read (`self.values.shape[1]`)."""
    assert now.error is not None
    places = _places(graph, now)
    site = now.error.site
    arrays = arrays_at(graph, site)
    kinds: dict[type, list[str]] = {}
    for path, (kind, _) in graph.numbers.items():
        kinds.setdefault(kind, []).append(path)
    found: list[tuple[int, int, str, list[str]]] = []
    for kind, paths in kinds.items():
        depth, read = names_read(kind, places)
        for rank, path in enumerate(running(paths, arrays, graph.reads, site)):
            for other, (_, stated) in graph.numbers.items():
                owner, _, part = other.rpartition("/")
                names = [name for name in stated if _last(name) in read]
                if names and (other == path or (owner == path and part in read)):
                    found.append((depth, rank, other, names))
    near: dict[str, list[str]] = {}
    for *_, path, names in sorted(found):
        near[path] = list(dict.fromkeys([*near.get(path, ()), *names]))
    return near


def _places(graph: ChannelGraph, now: Attempt) -> tuple[Place, ...]:
    """Of the user's frames at the difference, innermost first."""
    assert now.error is not None
    record = graph.records.get(now.error.site)
    if now.places or record is None:
        return now.places
    return tuple(source_places(record.eqn))


def _last(name: str) -> str:
    """The attribute by which a number is read: "widths.2" is an entry of `widths`."""
    return next(part for part in reversed(name.split(".")) if not part.isdigit())

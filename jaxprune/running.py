"""Which modules run at a place of a program, and what their sources read there."""

from __future__ import annotations

import functools
import inspect
import itertools
import types
from collections.abc import Iterator, Sequence

import numpy as np

from jaxprune.graph import ChannelGraph, Site, Value
from jaxprune.graph.interpret import is_user_file

# A place in a source: (file, line).
Place = tuple[str, int]


def running(
    paths: list[str], arrays: list[str], reads: Sequence[tuple[Site, str]], site: Site
) -> list[str]:
    """The modules of one class that may run at the site: by the arrays there, and where
    several lie as near to them, the one that read an array last, or reads one next.

    Args:
      paths: of the modules.
      arrays: names, of `arrays_at`.
      reads: where the program reads its variables, in order.
    """
    most = max(_shared(path, arrays) for path in paths)
    near = [path for path in paths if _shared(path, arrays) == most]
    if len(near) == 1:
        return near
    own = [(at, path) for at, name in reads for path in near if _inside(name, path)]
    before = [path for at, path in own if at <= site]
    after = [path for at, path in own if at > site]
    return list(dict.fromkeys([*before[-1:], *after[:1]])) or near[:1]


def _inside(name: str, path: str) -> bool:
    """True if the array is one of the module, or of its parts."""
    held = name.partition("/")[2] if name.startswith("params/") else name
    return not path or held.startswith(f"{path}/")


def arrays_at(graph: ChannelGraph, site: Site) -> list[str]:
    """Names of the arrays whose channels are used at the site."""
    record = graph.records.get(site)
    if record is None:
        return []
    # By channels too: nodes that go together may be of several classes, where it takes
    # a merge of axes to tie them.
    values = (*record.inputs, *record.outputs)
    label, used = graph.classes.label, _axes(values)
    labels = np.unique(np.concatenate([label[a] for a in used] or [[]]))
    needs = np.unique(np.concatenate([graph.needs(a).ravel() for a in used] or [[]]))
    needs = needs[needs >= 0]
    return [
        name
        for name, value in graph.leaves.items()
        if any(
            np.isin(label[a], labels).any() or np.isin(graph.needs(a), needs).any()
            for a in _axes([value])
        )
    ]


def _axes(values: Sequence[Value]) -> list[np.ndarray]:
    """The node vectors of the arrays' tracked axes."""
    return [axis for value in values for axis in value.axes if axis is not None]


def _shared(path: str, names: list[str]) -> int:
    """How many parts a module's path has in common with one of the arrays'."""
    parts = path.split("/")
    most = 0
    for name in names:
        held = name.removeprefix("params/").split("/")
        alike = (a == b for a, b in zip(parts, held, strict=False))
        most = max(most, sum(itertools.takewhile(bool, alike)))
    return most


def names_read(kind: type, places: tuple[Place, ...]) -> tuple[int, frozenset[str]]:
    """(how far out, names) of what the methods of a class read at places of its source.

    How far out is the number of the first place that lies in one of its methods. The
    names are those in these methods, and in the properties and methods they use.
    """
    codes = _codes(kind)
    first, found = len(places), set()
    for number, (file, line) in enumerate(places):
        for start, end, name, where, _ in codes:
            if where == file and start <= line <= end:
                first = min(first, number)
                found.add(name)
    names: set[str] = set()
    while found:
        method = found.pop()
        new = {n for _, _, name, _, read in codes if name == method for n in read}
        found |= {name for _, _, name, _, _ in codes if name in new - names}
        names |= new
    return first, frozenset(names)


@functools.lru_cache(maxsize=1024)
def _codes(kind: type) -> tuple[tuple[int, int, str, str, frozenset[str]], ...]:
    """(first line, last, name, file, names that it reads) of each method and property of
    a class and of the user's it derives from."""
    found = []
    for base in kind.__mro__:
        for name, held in vars(base).items():
            for inner in ("fget", "__func__", "func"):  # (cached) properties, methods
                held = getattr(held, inner, held)
            code = getattr(inspect.unwrap(held), "__code__", None)
            if isinstance(code, types.CodeType) and is_user_file(code.co_filename):
                lines = [
                    line for c in _nested(code) for *_, line in c.co_lines() if line
                ]
                names = frozenset(name for c in _nested(code) for name in _names(c))
                start = code.co_firstlineno
                found.append((start, max(lines), name, code.co_filename, names))
    return tuple(found)


def _names(code: types.CodeType) -> list[str]:
    """Attributes, and keys of mappings."""
    return [*code.co_names, *(key for key in code.co_consts if isinstance(key, str))]


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)

"""A factor moved from an array to the variables that it is linear in, exactly."""

# JAX types `aval` as its base class, which has no shape, and `val` as no attribute.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from jaxprune.graph import Record, Site
from jaxprune.graph.wiring import OPAQUE, Key, Wiring, shape_of
from jaxprune.regions import (
    NOWHERE,
    Region,
    conv_regions,
    dot_region,
    is_zero,
    mark,
    moved,
    overlap,
    reaches,
)

_LAYOUTS = frozenset(("reshape", "broadcast_in_dim", "transpose", "squeeze", "slice"))
_SAME = frozenset(
    (
        *("neg", "convert_element_type", "copy", "copy_p", "stop_gradient"),
        *("reduce_precision", "name", "sharding_constraint"),
    )
)


_COMPARISONS = frozenset(("eq", "ne", "lt", "le", "gt", "ge"))


def _is_number(atom: Any) -> bool:
    """True for a literal number that is not zero."""
    literal = isinstance(atom, jex.Literal) and np.ndim(atom.val) == 0
    return literal and not is_zero(atom)


def _takes_factors(dtype: Any) -> bool:
    """False for quantised arrays: what they are multiplied with is rounded away."""
    return bool(jnp.issubdtype(dtype, jnp.inexact)) and dtype.itemsize > 1


def _fills(eqn: Any) -> bool:
    """True for a gather that fills in a number that a factor would change."""
    mode, value = (eqn.params.get(name) for name in ("mode", "fill_value"))
    fills = mode == jax.lax.GatherScatterMode.FILL_OR_DROP
    return fills and value is not None and not (value == 0 or np.isnan(value))


class Leaf(NamedTuple):
    """A variable, or a region of it, that takes a factor: with `offset` (1 for the
    scale of a norm that is read as `1 + scale`), the sum of both takes it."""

    path: str
    region: Region
    offset: float = 0.0


@dataclass(eq=False)
class Push:
    """Moves a factor from an array to the variables that it is linear in.

    Attributes:
      is_parameter: which variables take factors: statistics that training computes
        anew would lose them.
      script: which operand to begin with at the first choices; 0 at later ones.
      choices: (operand begun with, operands) of the choices met.
      leaves: the variables that take it.
      off: arrays that lack the factor and stay so; what is made of one lacks it once
        more, so that no factor for another passes there.
      passed: products that lack the factor, by one of their operands.
      against: takes one over the factor.
    """

    wiring: Wiring
    records: Mapping[Site, Record]
    is_parameter: Callable[[str], bool]
    script: Sequence[int] = ()
    choices: list[tuple[int, int]] = field(default_factory=list)
    edges: set[tuple[Site, int, Any]] = field(default_factory=set)
    parts: dict[Key, list[Region]] = field(default_factory=dict)
    leaves: list[Leaf] = field(default_factory=list)
    off: set[Key] = field(default_factory=set)
    passed: set[Site] = field(default_factory=set)
    against: Push | None = None

    def into(self, key: Key | None, region: Region, offset: float = 0.0) -> bool:
        """True if the part of the array, plus the offset, can take the factor; on
        False the state of this object is as it was."""
        if key is None:
            return False
        path = self.wiring.leaf.get(key)
        for other in self.parts.get(key, ()):
            if mark(other) == mark(region):
                return path is None or self._offset(path, region) == offset
            if overlap(other, region):
                return False
        if key in self.off:
            return False
        if path is not None and not (
            self.is_parameter(path) and _takes_factors(key[1].aval.dtype)
        ):
            return False
        before = self._state()
        self.parts.setdefault(key, []).append(region)
        if path is not None:
            self.leaves.append(Leaf(path, region, offset))
            return True
        maker = self.wiring.maker.get(key)
        whole = maker and self.off.isdisjoint(self.wiring.operands(maker[0]))
        if maker and whole and self._through(*maker, region):
            return True
        self._restore(before)
        return False

    def _offset(self, path: str, region: Region) -> float:
        """With what offset a leaf takes the factor."""
        held = (part for part in self.leaves if part.path == path)
        return next(p.offset for p in held if mark(p.region) == mark(region))

    def onward(self, key: Key) -> bool:
        """True if all that reads the array can take its factor from elsewhere: the
        kernels it is multiplied with, the scales of a norm, or what their product is
        multiplied with next."""
        products: list[tuple[Site, int]] = []
        if not self._products(key, products):
            return False
        return all(
            self._push(site, 1 - place, None) or self._beyond(site)
            for site, place in products
        )

    def _beyond(self, site: Site) -> bool:
        """True if what reads a product that lacks the factor can take it; not where
        both of its operands lack it."""
        if site in self.passed:
            return False
        self.passed.add(site)
        return self.onward((site[:-1], self.wiring.equations[site].outvars[0]))

    def _products(self, key: Key, found: list[tuple[Site, int]]) -> bool:
        """Adds the places at which products read the array, or what layouts make of
        it; False if anything else reads it."""
        self.off.add(key)
        readers = self.wiring.readers[key]
        return bool(readers) and all(self._product(*edge, found) for edge in readers)

    def _product(self, site: Site, place: int, found: list[tuple[Site, int]]) -> bool:
        """The same for one reader of an array."""
        if site == OPAQUE:
            return False
        eqn = self.wiring.equations[site]
        name = eqn.primitive.name
        if name in ("mul", "dot_general", "conv_general_dilated"):
            found.append((site, place))
            return True
        layout = name in _SAME or name in _LAYOUTS
        return layout and self._products((site[:-1], eqn.outvars[0]), found)

    def closed(self) -> bool:
        """True if nothing reads a scaled part but what was pushed through."""
        return not self._open()

    def _open(self) -> list[tuple[Site, int, Region]]:
        """What else reads a scaled part."""
        return [
            (site, place, region)
            for key, regions in self.parts.items()
            for region in regions
            for site, place in self.wiring.readers[key]
            if (site, place, mark(region)) not in self.edges
            and (
                site == OPAQUE
                or not (self._misses(site, region) or self._asks_sign(site, place))
            )
        ]

    def balanced(self) -> bool:
        """True if all else that reads a scaled array is multiplied with what can take
        one over the factor, `against`: the last norm, where an embedding is the table
        of the logits as well."""
        other = Push(self.wiring, self.records, self.is_parameter)
        other.off.update(self.parts, self.off)
        products: list[tuple[Site, int]] = []
        for site, place, region in self._open():
            if region is not None or not other._product(site, place, products):
                return False
        pushed = all(other._push(site, 1 - place, None) for site, place in products)
        if pushed and other.closed():
            self.against = other
        return self.against is not None

    def _misses(self, site: Site, region: Region) -> bool:
        """True if a slice reads none of the region."""
        eqn = self.wiring.equations[site]
        if eqn.primitive.name != "slice" or region is None:
            return False
        rank = len(shape_of(eqn.invars[0].aval))
        axis, mask = region
        start, stop = (
            eqn.params[name][rank + axis] for name in ("start_indices", "limit_indices")
        )
        return not mask[start:stop].any()

    def _asks_sign(self, site: Site, place: int) -> bool:
        """True if a comparison with 0 reads the operand: factors are positive."""
        name = self.wiring.equations[site].primitive.name
        return name == "sign" or (
            name in _COMPARISONS and self._is_zero(site, 1 - place)
        )

    def _either(self, site: Site, options: Sequence[tuple[int, Region]]) -> bool:
        """Pushes to one of the operands, in their order from the script's on."""
        if not options:
            return False
        number = len(self.choices)
        pick = self.script[number] if number < len(self.script) else 0
        self.choices.append((pick, len(options)))
        return any(self._push(site, place, part) for place, part in options[pick:])

    def _state(self) -> Any:
        parts = {key: list(regions) for key, regions in self.parts.items()}
        return set(self.edges), parts, list(self.leaves)

    def _restore(self, state: Any) -> None:
        self.edges, self.parts, self.leaves = state

    def _push(self, site: Site, place: int, region: Region) -> bool:
        edge = (site, place, mark(region))
        known = edge in self.edges
        self.edges.add(edge)
        if self.into(self.wiring.operands(site)[place], region):
            return True
        if not known:
            self.edges.discard(edge)
        return False

    def _plus(self, site: Site, place: int, offset: float) -> bool:
        """True if the operand is a variable, but for casts and layouts, that can take
        the factor with that offset."""
        key = self.wiring.operands(site)[place]
        if key in self.wiring.leaf:
            self.edges.add((site, place, mark(None)))
            return self.into(key, None, offset)
        if key in self.parts or key in self.off or key not in self.wiring.maker:
            return False
        maker, eqn, _ = self.wiring.maker[key]
        name = eqn.primitive.name
        if name not in _LAYOUTS and (name not in _SAME or name == "neg"):
            return False
        self.edges.add((site, place, mark(None)))
        self.parts[key] = [None]
        return self._plus(maker, 0, offset)

    def _is_zero(self, site: Site, place: int) -> bool:
        """True if the operand is made of nothing but the literal 0."""
        if is_zero(self.wiring.equations[site].invars[place]):
            return True
        key = self.wiring.operands(site)[place]
        if key is None or key not in self.wiring.maker:
            return False
        maker, eqn, _ = self.wiring.maker[key]
        layout = eqn.primitive.name in _LAYOUTS or eqn.primitive.name in _SAME
        return layout and self._is_zero(maker, 0)

    def _through(self, site: Site, eqn: Any, result: int, region: Region) -> bool:
        name = eqn.primitive.name
        if not jnp.issubdtype(eqn.outvars[result].aval.dtype, jnp.inexact):
            return False  # rounding to integers is not linear
        shapes = [shape_of(atom.aval) for atom in eqn.invars]
        out = shape_of(eqn.outvars[result].aval)
        if name in _SAME:
            return self._push(site, 0, region)
        if name in ("mul", "div"):
            # What depends on variables alone is the better place: the scale of a norm.
            pure = [value.pure for value in self.records[site].inputs]
            both = [0, 1] if pure[0] else [1, 0]
            places = [0] if name == "div" else both
            return self._either(
                site,
                [
                    (place, region)
                    for place in places
                    if region is None or reaches(shapes[place], region)
                ],
            )
        numbers = [p for p, atom in enumerate(eqn.invars) if _is_number(atom)]
        if name in ("add", "sub") and numbers:  # 1 + scale, 1 - scale, scale - 1
            number = float(eqn.invars[numbers[0]].val)
            offset = number if name == "add" else -number
            return region is None and self._plus(site, 1 - numbers[0], offset)
        if name in ("add", "sub", "select_n", "max", "min"):
            first = 1 if name == "select_n" else 0
            return all(
                self._is_zero(site, p)
                or (
                    (region is None or reaches(shapes[p], region))
                    and self._push(site, p, region)
                )
                for p in range(first, len(shapes))
            )
        if name in ("dot_general", "conv_general_dilated"):
            if name == "dot_general":
                parts = [dot_region(eqn, shapes, len(out), p, region) for p in (0, 1)]
            else:
                parts = conv_regions(eqn, len(out), region)
            options = [(place, parts[place]) for place in (1, 0)]
            return self._either(site, [o for o in options if o[1] is not NOWHERE])
        if name in ("gather", "dynamic_slice") and region is None:
            return not _fills(eqn) and self._push(site, 0, None)
        # Factors are positive: max(c x) = c max(x).
        if name == "abs" or (name == "reduce_window_max" and region is None):
            return self._push(site, 0, region)
        if name == "concatenate":
            return self._concatenate(site, eqn, shapes, region)
        part = moved(eqn, result, shapes[0], out, region)
        return part is not NOWHERE and self._push(site, 0, part)

    def _concatenate(self, site: Site, eqn: Any, shapes: Any, region: Region) -> bool:
        rank, start = len(shapes[0]), 0
        along = eqn.params["dimension"] - rank
        for place, shape in enumerate(shapes):
            part: Region = region
            if region is not None and region[0] == along:
                mask = region[1][start : start + shape[along]]
                start += shape[along]
                if not mask.any():
                    continue
                part = None if mask.all() else (along, mask)
            if not self._push(site, place, part):
                return False
        return True

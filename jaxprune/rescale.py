"""Constants that follow a size (1/sqrt(d) of attention), folded into the kernels.

The source recomputes such a constant from the slim arrays, which changes the function:
after a query/key width shrinks from D to D', scores are divided by sqrt(D') instead of
sqrt(D). Where the operand of such a factor is linear in some kernels that nothing else
reads, those kernels (and biases, or the scales of a norm in between) take the factor
sqrt(D'/D), and the slim model equals the masked original exactly. Where it is not, what
its result is multiplied with next may take it. Where nothing can, the static check
refuses the plan.
"""

# JAX types `aval` as its base class, which has no shape, and `val` as no attribute.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.graph import ChannelGraph, Record, Site
from jaxprune.graph.evaluate import bind
from jaxprune.graph.wiring import OPAQUE, Key, Wiring, scalars, shape_of
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


@dataclass(frozen=True, eq=False)
class Factor:
    """What one variable is multiplied with: `by`, on a region of one axis or all."""

    path: str
    by: float
    region: Region = None


@dataclass(frozen=True, eq=False)
class Folded:
    """Factors of variables, and the sites whose constants they make up for."""

    factors: tuple[Factor, ...] = ()
    sites: frozenset[Site] = frozenset()


def fold_constants(
    graph: ChannelGraph, literals: Mapping[Site, Sequence[Any]]
) -> Folded:
    """The factors that undo the size-dependent constants of a slim program.

    Args:
      literals: of the slim program, from `check.align`.
    """
    wiring = graph.wiring
    known = scalars(wiring, literals, bind)
    factors: list[Factor] = []
    folded: set[Site] = set()
    taken: set[Key] = set()
    for site, eqn in wiring.equations.items():
        name = eqn.primitive.name
        if name not in ("mul", "div") or site not in literals:
            continue
        keys = wiring.operands(site)
        for place in (1, 0) if name == "mul" else (1,):
            constant = _constant(eqn, keys, place, site, literals, known)
            other = keys[1 - place]
            if constant is None or other is None or other in known:
                continue
            old, new, sites = constant
            if not (old > 0 and new > 0) or not _read_once(wiring, keys[place]):
                continue
            by = old / new if name == "mul" else new / old
            push = _pushed(wiring, graph.records, (site, 1 - place), other, taken)
            if push is None:
                push = _passed_on(wiring, graph.records, (site[:-1], eqn.outvars[0]))
            if push is not None and not taken & push.touched:
                factors += [Factor(path, by, part) for path, part in push.leaves]
                folded |= sites
                taken |= push.touched
    return Folded(tuple(factors), frozenset(folded))


def rescale(kept: Any, folded: Folded, variables: Any) -> Any:
    """The sliced variables with the factors multiplied in.

    kept: {path: {axis: kept indices}}, from `slicing.keep_indices`.
    """
    leaves = trees.flatten(variables)
    changed = {}
    for factor in folded.factors:
        leaf = changed.get(factor.path, leaves[factor.path])
        if isinstance(leaf, jax.ShapeDtypeStruct):
            continue
        by = np.asarray(factor.by, np.float64)
        if factor.region is not None:
            axis, mask = factor.region
            rank = len(leaf.shape)
            kept_here = kept.get(factor.path, {}).get(rank + axis)
            mask = mask if kept_here is None else mask[kept_here]
            shape = [1] * rank
            shape[axis] = mask.size
            by = np.where(mask, factor.by, 1.0).reshape(shape)
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        scaled = jnp.asarray(leaf, wide) * jnp.asarray(by, wide)
        changed[factor.path] = scaled.astype(leaf.dtype)
    return trees.replace(variables, changed) if changed else variables


def _differs(old: Any, new: Any) -> bool:
    """True for two numbers that are not equal."""
    if np.ndim(old) or np.ndim(new):
        return False
    return np.asarray(old).dtype.kind in "iuf" and bool(np.asarray(old) != new)


def _constant(eqn, keys, place, site, literals, known):
    """(original, slim, literal sites) of a constant operand that differs, or None."""
    atom = eqn.invars[place]
    if keys[place] is not None:
        return known.get(keys[place])
    old, new = atom.val, literals[site][place]
    if not _differs(old, new):
        return None
    return float(old), float(new), frozenset([site])


def _read_once(wiring: Wiring, key: Key | None) -> bool:
    """The constant, and all it is made of, serve this one equation."""
    if key is None:
        return True
    if len(wiring.readers[key]) != 1 or key not in wiring.maker:
        return False
    site, _, _ = wiring.maker[key]
    return all(_read_once(wiring, k) for k in wiring.operands(site))


_LAYOUTS = frozenset(("reshape", "broadcast_in_dim", "transpose", "squeeze", "slice"))
_SAME = frozenset(
    (
        *("neg", "convert_element_type", "copy", "copy_p", "stop_gradient"),
        *("reduce_precision", "name", "sharding_constraint"),
    )
)


# Ways of pushing one factor that are tried: one for each choice between the operands of
# a product.
_TRIES = 64


def _pushed(
    wiring: Wiring,
    records: Mapping[Site, Record],
    edge: tuple[Site, int],
    key: Key,
    taken: set[Key],
) -> _Push | None:
    """A push that nothing else reads, or None: all choices are tried in turn."""
    script: list[int] = []
    for _ in range(_TRIES):
        push = _Push(wiring, records, script)
        push.edges.add((*edge, mark(None)))
        if push.into(key, None) and push.closed() and not taken & push.touched:
            return push
        choices = push.choices
        while choices and choices[-1][0] + 1 >= choices[-1][1]:
            choices.pop()
        if not choices:
            return None
        script = [pick for pick, _ in choices]
        script[-1] += 1
    return None


def _passed_on(
    wiring: Wiring, records: Mapping[Site, Record], key: Key
) -> _Push | None:
    """A push into whatever the array is multiplied with next, or None."""
    push = _Push(wiring, records)
    return push if push.onward(key) and push.closed() else None


def _takes_factors(dtype: Any) -> bool:
    """False for quantised arrays: what they are multiplied with is rounded away."""
    return bool(jnp.issubdtype(dtype, jnp.inexact)) and dtype.itemsize > 1


@dataclass(eq=False)
class _Push:
    """Moves a factor from an array to the variables that it is linear in.

    Attributes:
      script: which operand to begin with at the first choices; 0 at later ones.
      choices: (operand begun with, operands) of the choices met.
      off: arrays that lack the factor and stay so; what is made of one lacks it once
        more, so that no factor for another passes there.
    """

    wiring: Wiring
    records: Mapping[Site, Record]
    script: Sequence[int] = ()
    choices: list[tuple[int, int]] = field(default_factory=list)
    edges: set[tuple[Site, int, Any]] = field(default_factory=set)
    parts: dict[Key, list[Region]] = field(default_factory=dict)
    leaves: list[tuple[str, Region]] = field(default_factory=list)
    off: set[Key] = field(default_factory=set)

    @property
    def touched(self) -> set[Key]:
        return set(self.parts)

    def into(self, key: Key | None, region: Region) -> bool:
        """True if the part of the array can take the factor; on False the state of
        this object is as it was."""
        if key is None:
            return False
        for other in self.parts.get(key, ()):
            if mark(other) == mark(region):
                return True
            if overlap(other, region):
                return False
        if key in self.wiring.leaf and not _takes_factors(key[1].aval.dtype):
            return False
        before = self._state()
        self.parts.setdefault(key, []).append(region)
        if key in self.wiring.leaf:
            self.leaves.append((self.wiring.leaf[key], region))
            return True
        maker = self.wiring.maker.get(key)
        whole = maker and self.off.isdisjoint(self.wiring.operands(maker[0]))
        if maker and whole and key not in self.off and self._through(*maker, region):
            return True
        self._restore(before)
        return False

    def onward(self, key: Key) -> bool:
        """True if all that reads the array can take its factor from elsewhere: the
        kernels it is multiplied with, the scales of a norm."""
        products: list[tuple[Site, int]] = []
        if not self._products(key, products):
            return False
        return all(self._push(site, 1 - place, None) for site, place in products)

    def _products(self, key: Key, found: list[tuple[Site, int]]) -> bool:
        """Adds the places at which products read the array, or what layouts make of
        it; False if anything else reads it."""
        self.off.add(key)
        for site, place in self.wiring.readers[key]:
            if site == OPAQUE:
                return False
            eqn = self.wiring.equations[site]
            name = eqn.primitive.name
            if name in ("mul", "dot_general", "conv_general_dilated"):
                found.append((site, place))
            elif (
                name not in _SAME
                and name not in _LAYOUTS
                or not self._products((site[:-1], eqn.outvars[0]), found)
            ):
                return False
        return bool(self.wiring.readers[key])

    def closed(self) -> bool:
        """True if nothing reads a scaled part but what was pushed through."""
        return all(
            (site, place, mark(region)) in self.edges
            or (site != OPAQUE and self._misses(site, region))
            for key, regions in self.parts.items()
            for region in regions
            for site, place in self.wiring.readers[key]
        )

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
        if name in ("add", "sub", "select_n"):
            first = 1 if name == "select_n" else 0
            return all(
                is_zero(eqn.invars[p])
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
            return self._push(site, 0, None)
        if name == "max" and any(map(is_zero, eqn.invars)):  # relu(c x) = c relu(x)
            return self._push(site, int(is_zero(eqn.invars[0])), region)
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

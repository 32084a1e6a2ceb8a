"""Constants that follow a size (1/sqrt(d) of attention), folded into the kernels.

The source recomputes such a constant from the slim arrays, which changes the function:
after a query/key width shrinks from D to D', scores are divided by sqrt(D') instead of
sqrt(D). Where the operand of such a factor is linear in some kernels that nothing else
reads, those kernels (and biases, or the scales of a norm in between) take the factor
sqrt(D'/D), and the slim model equals the masked original exactly. Where it is not (the
mean of a normalisation), the constant stays the slim program's: it normalises over
what is left.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxprune import trees
from jaxprune.graph import ChannelGraph, Record, Site
from jaxprune.graph.evaluate import bind
from jaxprune.graph.wiring import OPAQUE, Key, Wiring, scalars

# Part of an array: an axis counted from the right, and bool (n,) on it; None for all.
Region = tuple[int, np.ndarray] | None


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
    if not _differ(graph, literals):
        return Folded()
    wiring = Wiring.of(graph.closed, list(graph.leaves))
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
            push = _Push(wiring, graph.records)
            push.edges.add((site, 1 - place, _mark(None)))
            if push.into(other, None) and push.closed() and not taken & push.touched:
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


def with_original(
    literals: Mapping[Site, Sequence[Any]], folded: Folded
) -> Mapping[Site, Sequence[Any]]:
    """The literals of the masked original: folded constants keep their values."""
    restored = {site: [None] * len(literals[site]) for site in folded.sites}
    return {**literals, **restored}


def _differ(graph: ChannelGraph, literals: Mapping[Site, Sequence[Any]]) -> bool:
    return any(
        isinstance(atom, jex.Literal) and _differs(atom.val, new)
        for site, record in graph.records.items()
        for atom, new in zip(record.eqn.invars, literals[site], strict=True)
    )


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


def _mark(region: Region) -> Any:
    return None if region is None else (region[0], region[1].tobytes())


_SAME = frozenset(
    (
        *("neg", "convert_element_type", "copy", "copy_p", "stop_gradient"),
        *("reduce_precision", "name", "sharding_constraint"),
    )
)


@dataclass(eq=False)
class _Push:
    """Moves a factor from an array to the variables that it is linear in."""

    wiring: Wiring
    records: Mapping[Site, Record]
    edges: set[tuple[Site, int, Any]] = field(default_factory=set)
    parts: dict[Key, list[Region]] = field(default_factory=dict)
    leaves: list[tuple[str, Region]] = field(default_factory=list)

    @property
    def touched(self) -> set[Key]:
        return set(self.parts)

    def into(self, key: Key | None, region: Region) -> bool:
        """True if the part of the array can take the factor; on False the state of
        this object is as it was."""
        if key is None:
            return False
        for other in self.parts.get(key, ()):
            if _mark(other) == _mark(region):
                return True
            if _overlap(other, region):
                return False
        before = self._state()
        self.parts.setdefault(key, []).append(region)
        if key in self.wiring.leaf:
            self.leaves.append((self.wiring.leaf[key], region))
            return True
        if key in self.wiring.maker and self._through(*self.wiring.maker[key], region):
            return True
        self._restore(before)
        return False

    def closed(self) -> bool:
        """True if nothing reads a scaled part but what was pushed through."""
        return all(
            (site, place, _mark(region)) in self.edges
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
        rank = len(eqn.invars[0].aval.shape)
        axis, mask = region
        start, stop = (
            eqn.params[name][rank + axis] for name in ("start_indices", "limit_indices")
        )
        return not mask[start:stop].any()

    def _state(self) -> Any:
        parts = {key: list(regions) for key, regions in self.parts.items()}
        return set(self.edges), parts, list(self.leaves)

    def _restore(self, state: Any) -> None:
        self.edges, self.parts, self.leaves = state

    def _push(self, site: Site, place: int, region: Region) -> bool:
        edge = (site, place, _mark(region))
        known = edge in self.edges
        self.edges.add(edge)
        if self.into(self.wiring.operands(site)[place], region):
            return True
        if not known:
            self.edges.discard(edge)
        return False

    def _through(self, site: Site, eqn: Any, result: int, region: Region) -> bool:
        name = eqn.primitive.name
        shapes = [tuple(atom.aval.shape) for atom in eqn.invars]
        out = tuple(eqn.outvars[result].aval.shape)
        if name in _SAME:
            return self._push(site, 0, region)
        if name in ("mul", "div"):
            # What depends on variables alone is the better place: the scale of a norm.
            pure = [value.pure for value in self.records[site].inputs]
            both = [0, 1] if pure[0] else [1, 0]
            places = [0] if name == "div" else both
            fits = [p for p in places if region is None or _reaches(shapes[p], region)]
            return any(self._push(site, place, region) for place in fits)
        if name in ("add", "sub", "select_n"):
            first = 1 if name == "select_n" else 0
            return all(
                _is_zero(eqn.invars[p])
                or (
                    (region is None or _reaches(shapes[p], region))
                    and self._push(site, p, region)
                )
                for p in range(first, len(shapes))
            )
        if name == "dot_general":
            return any(
                self._push(site, place, part)
                for place in (1, 0)
                for part in [_dot_region(eqn, shapes, len(out), place, region)]
                if part is None or part[1].size
            )
        if name == "concatenate":
            return self._concatenate(site, eqn, shapes, region)
        moved = _moved(eqn, result, shapes[0], out, region)
        return moved is not False and self._push(site, 0, moved)

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


def _overlap(a: Region, b: Region) -> bool:
    if a is None or b is None or a[0] != b[0]:
        return True
    return bool((a[1] & b[1]).any())


def _reaches(shape: tuple[int, ...], region: tuple[int, np.ndarray]) -> bool:
    """True if an operand has the region's axis at full length."""
    axis, mask = region
    return len(shape) >= -axis and shape[axis] == mask.size


def _is_zero(atom: Any) -> bool:
    return isinstance(atom, jex.Literal) and not np.any(atom.val)


_NOWHERE = (-1, np.zeros(0, bool))


def _dot_region(eqn, shapes, rank: int, place: int, region: Region) -> Region:
    """The region of one operand that the region of a product comes from."""
    if region is None:
        return None
    contract, batch = eqn.params["dimension_numbers"]
    used = [{*contract[s], *batch[s]} for s in (0, 1)]
    free = [[d for d in range(len(shapes[s])) if d not in used[s]] for s in (0, 1)]
    dim = rank + region[0] - len(batch[0])
    if dim < 0:
        own = batch[place][dim + len(batch[0])]
    elif place == 0 and dim < len(free[0]):
        own = free[0][dim]
    elif place == 1 and dim >= len(free[0]):
        own = free[1][dim - len(free[0])]
    else:
        return _NOWHERE
    return own - len(shapes[place]), region[1]


def _moved(eqn, result: int, old: Any, new: Any, region: Region) -> Region | bool:
    """The region of the operand of a layout primitive, or False."""
    name, params, rank = eqn.primitive.name, eqn.params, len(old)
    if name in ("slice", "split"):
        if name == "slice":
            if params["strides"] and any(s != 1 for s in params["strides"]):
                return False
            starts = params["start_indices"]
        else:
            starts = [0] * rank
            starts[params["axis"]] = sum(params["sizes"][:result])
        cut = [d for d in range(rank) if old[d] != new[d]]
        if region is not None:
            cut = sorted({*cut, rank + region[0]})
        if len(cut) > 1:
            return False
        if not cut:
            return region
        mask = np.zeros(old[cut[0]], bool)
        inside = slice(starts[cut[0]], starts[cut[0]] + new[cut[0]])
        mask[inside] = True if region is None else region[1]
        return cut[0] - rank, mask
    if name not in (
        "reshape",
        "transpose",
        "squeeze",
        "expand_dims",
        "broadcast_in_dim",
        "reduce_sum",
    ):
        return False
    if region is None:
        return None
    dim, mask = len(new) + region[0], region[1]
    if name == "transpose":
        return params["permutation"][dim] - rank, mask
    if name == "broadcast_in_dim":
        target = list(params["broadcast_dimensions"])
        if dim not in target or old[target.index(dim)] != mask.size:
            return False
        return target.index(dim) - rank, mask
    if name == "reduce_sum":
        left = [d for d in range(rank) if d not in params["axes"]]
        return left[dim] - rank, mask
    return _reshaped(old, new, dim, mask)


def _reshaped(old: Any, new: Any, dim: int, mask: np.ndarray) -> Region | bool:
    """Only the axes around the region change places with others: batch axes may not."""
    shape = [1] * len(new)
    shape[dim] = mask.size
    lead = 0
    while lead < min(len(old), dim) and old[lead] == new[lead]:
        lead += 1
    whole = np.broadcast_to(mask.reshape(shape[lead:]), new[lead:])
    inner = whole.reshape(old[lead:])
    for axis in range(inner.ndim):
        rest = tuple(d for d in range(inner.ndim) if d != axis)
        if (inner.all(rest) == inner.any(rest)).all():
            return axis - inner.ndim, inner.any(rest)
    return False

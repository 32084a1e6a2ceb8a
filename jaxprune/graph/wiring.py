"""Who makes and who reads each array of a traced program, across its calls."""

# JAX types `aval` as its base class, which has no shape, and `val` as no attribute.
# pyright: reportAttributeAccessIssue=false

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxprune.graph.integers import COMPARISONS
from jaxprune.graph.interpret import Site, acts, is_empty
from jaxprune.graph.rules.control import CALLS, inner_jaxpr, scan_counts

# A variable of a jaxpr at one call site (sub-jaxprs are shared between sites).
Key = tuple[Site, Any]
OPAQUE: Site = (-1,)


@dataclass(eq=False)
class Wiring:
    """The data flow, with calls inlined and loops opened for what does not change.

    Attributes:
      maker: {array: (site, equation, number of the result)}.
      readers: {array: [(site, operand number)]}; OPAQUE where a loop's carry, a branch
        or the output reads it.
      leaf: {array: name of the variable it is}.
      equations: {site: equation}.
      dead: sites of equations whose results nothing uses, and of calls that hold
        none but these; they read nothing.
    """

    maker: dict[Key, tuple[Site, jex.JaxprEqn, int]] = field(default_factory=dict)
    readers: dict[Key, list[tuple[Site, int]]] = field(
        default_factory=lambda: defaultdict(list)
    )
    leaf: dict[Key, str] = field(default_factory=dict)
    equations: dict[Site, jex.JaxprEqn] = field(default_factory=dict)
    dead: set[Site] = field(default_factory=set)
    _alias: dict[Key, Key] = field(default_factory=dict)

    @classmethod
    def of(cls, closed: jex.ClosedJaxpr, names: Sequence[str]) -> Wiring:
        """The wiring of a program whose first arguments are the named variables."""
        wiring = cls()
        for name, var in zip(names, closed.jaxpr.invars, strict=False):
            wiring.leaf[(), var] = name
        wiring._walk(closed.jaxpr, ())
        for atom in closed.jaxpr.outvars:
            wiring._opaque((), [atom])
        wiring._decide()
        wiring._bury()
        return wiring

    def key(self, site: Site, atom: Any) -> Key | None:
        """The array that an operand is; None for a literal."""
        if isinstance(atom, jex.Literal):
            return None
        key = (site, atom)
        while key in self._alias:
            key = self._alias[key]
        return key

    def operands(self, site: Site) -> list[Key | None]:
        """The operands of the equation at a site."""
        return [self.key(site[:-1], atom) for atom in self.equations[site].invars]

    def _decide(self) -> None:
        """Of a choice that literals decide (JAX's `0 < 0 ? 0 + size : 0` for an index),
        only what is chosen is read."""
        known: dict[Key, bool] = {}
        for site, eqn in self.equations.items():
            literals = [
                a.val if isinstance(a, jex.Literal) else None for a in eqn.invars
            ]
            compare = COMPARISONS.get(eqn.primitive.name)
            if compare and not any(v is None or np.ndim(v) for v in literals):
                known[site[:-1], eqn.outvars[0]] = bool(compare(*literals))
            elif eqn.primitive.name == "select_n":
                keys = self.operands(site)
                chosen = literals[0] if keys[0] is None else known.get(keys[0])
                if chosen is None or np.ndim(chosen):
                    continue
                for place, key in enumerate(keys[1:]):
                    if key is not None and place != int(chosen):
                        self.readers[key].remove((site, place + 1))

    def _bury(self) -> None:
        """Finds the dead equations, from the last to the first."""
        results: dict[Site, list[Key]] = defaultdict(list)
        for key, (site, _, _) in self.maker.items():
            results[site].append(key)
            if is_empty(key[1]):
                self.readers[key] = []
        alive: set[Site] = set()  # calls of which an equation is used
        for site in reversed(self.equations):
            made = results[site]
            eqn = self.equations[site]
            if eqn.effects:
                used = acts(eqn)
            elif eqn.primitive.name in CALLS:
                used = site in alive
            else:
                used = not made
            if used or any(self.readers[key] for key in made):
                alive.add(site[:-1])
                continue
            self.dead.add(site)
            for key in self.operands(site):
                if key is not None:
                    self.readers[key] = [r for r in self.readers[key] if r[0] != site]

    def _opaque(self, site: Site, atoms: Sequence[Any]) -> None:
        for atom in atoms:
            key = self.key(site, atom)
            if key is not None:
                self.readers[key].append((OPAQUE, 0))

    def _walk(self, jaxpr: Any, site: Site) -> None:
        atoms = [*(a for eqn in jaxpr.eqns for a in eqn.invars), *jaxpr.outvars]
        used = {atom for atom in atoms if not isinstance(atom, jex.Literal)}
        for number, eqn in enumerate(jaxpr.eqns):
            here, name = (*site, number), eqn.primitive.name
            self.equations[here] = eqn
            if name in CALLS:
                self._enter(inner_jaxpr(eqn).jaxpr, here, site, eqn.invars)
                for out, inner in zip(
                    eqn.outvars, inner_jaxpr(eqn).jaxpr.outvars, strict=True
                ):
                    if not isinstance(inner, jex.Literal):
                        self._alias[site, out] = (here, inner)
            elif name == "scan":
                # What all rounds share, and stacked variables: scaling the stack
                # scales the slice of every round.
                consts, carries = scan_counts(eqn)
                first = consts + carries
                steady = [
                    atom if k < consts or k >= first else None
                    for k, atom in enumerate(eqn.invars)
                ]
                body = eqn.params["jaxpr"].jaxpr
                self._opaque(site, eqn.invars[consts:first])
                self._enter(body, here, site, steady)
                # NNX hands every Variable back out of a loop, whoever reads it.
                ends = zip(body.outvars, eqn.outvars, strict=True)
                kept = [
                    inner
                    for k, (inner, outer) in enumerate(ends)
                    if k < carries or outer in used
                ]
                self._opaque(here, kept)
            else:
                for place, atom in enumerate(eqn.invars):
                    key = self.key(site, atom)
                    if key is not None:
                        loop = name in ("while", "cond")
                        reader = (OPAQUE, 0) if loop else (here, place)
                        self.readers[key].append(reader)
                for place, var in enumerate(eqn.outvars):
                    if name not in ("while", "cond"):
                        self.maker[site, var] = (here, eqn, place)

    def _enter(self, body: Any, here: Site, site: Site, atoms: Sequence[Any]) -> None:
        for var, atom in zip(body.invars, atoms, strict=True):
            if atom is not None and not isinstance(atom, jex.Literal):
                self._alias[here, var] = (site, atom)
        self._walk(body, here)


# By array: its number, that in the slim program, the sites of its literals.
Scalars = dict[Key, tuple[float, float, frozenset[Site]]]


def scalars(
    wiring: Wiring, literals: Mapping[Site, Sequence[Any]], bind: Any
) -> Scalars:
    """{array: (value, value in the slim program, sites of its literals)} for numbers
    that follow from literals alone and differ between the two programs."""
    found: Scalars = {}
    for site, eqn in wiring.equations.items():
        name, avals = eqn.primitive.name, [var.aval for var in eqn.outvars]
        if (
            name in CALLS
            or site not in literals
            or len(avals) != 1
            or shape_of(avals[0])
            or jnp.issubdtype(avals[0].dtype, jax.dtypes.extended)
        ):
            continue
        pairs: list[tuple[Any, Any]] = []
        sites: set[Site] = set()
        keys = wiring.operands(site)
        for atom, key, new in zip(eqn.invars, keys, literals[site], strict=True):
            if isinstance(atom, jex.Literal):
                pairs.append((atom.val, new))
                sites |= {site} if bool(atom.val != new) else set()
            elif key in found:
                pairs.append(found[key][:2])
                sites |= found[key][2]
        if len(pairs) != len(keys) or not sites:
            continue
        dtypes = [getattr(atom.aval, "dtype", None) for atom in eqn.invars]
        old, new = (
            bind(eqn, [jnp.asarray(p[k], d) for p, d in zip(pairs, dtypes)])[0]
            for k in (0, 1)
        )
        if jnp.issubdtype(old.dtype, jnp.complexfloating):
            if old.imag or new.imag:
                continue
            old, new = old.real, new.real
        numbers = float(old), float(new)
        found[site[:-1], eqn.outvars[0]] = (*numbers, frozenset(sites))
    return found


def shape_of(aval: Any) -> tuple[int, ...]:
    """The shape of an abstract value."""
    return tuple(aval.shape)

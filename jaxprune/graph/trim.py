"""Programs without what nothing reads: a size asked of a slice, a branch not taken."""

from __future__ import annotations

from typing import Any

from jax.extend import core as jex


def trimmed(closed: jex.ClosedJaxpr) -> jex.ClosedJaxpr:
    """The program without equations and constants that no output or effect needs.

    Sub-jaxprs keep all of their results. A program with nothing to take away is
    returned as it is, so that what JAX has compiled for it serves on.
    """
    needed = {v for v in closed.jaxpr.outvars if not isinstance(v, jex.Literal)}
    kept = []
    for eqn in reversed(closed.jaxpr.eqns):
        if eqn.effects or not needed.isdisjoint(eqn.outvars):
            needed.update(v for v in eqn.invars if not isinstance(v, jex.Literal))
            kept.append(_inside(eqn))
    held = [
        (var, value)
        for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True)
        if var in needed
    ]
    same = len(kept) == len(closed.jaxpr.eqns) and len(held) == len(closed.consts)
    if same and all(a is b for a, b in zip(reversed(kept), closed.jaxpr.eqns)):
        return closed
    jaxpr = closed.jaxpr.replace(constvars=[var for var, _ in held], eqns=kept[::-1])
    return jex.ClosedJaxpr(jaxpr, [value for _, value in held])


def _inside(eqn: jex.JaxprEqn) -> jex.JaxprEqn:
    params = {name: _trim_parameter(value) for name, value in eqn.params.items()}
    if all(params[name] is value for name, value in eqn.params.items()):
        return eqn
    return eqn.replace(params=params)


def _trim_parameter(value: Any) -> Any:
    if isinstance(value, jex.ClosedJaxpr):
        return trimmed(value)
    if isinstance(value, jex.Jaxpr):
        found = trimmed(jex.ClosedJaxpr(value, ())) if not value.constvars else None
        return value if found is None else found.jaxpr
    if isinstance(value, tuple) and any(isinstance(v, jex.ClosedJaxpr) for v in value):
        found = tuple(map(_trim_parameter, value))
        return found if any(a is not b for a, b in zip(found, value)) else value
    return value

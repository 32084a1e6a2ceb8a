"""Calls, loops and branches: the walk goes into their sub-jaxprs."""

from collections.abc import Sequence
from typing import Any

from jax.extend import core as jex

from jaxprune.graph.interpret import Value, Walk

# What runs its one sub-jaxpr, once; evaluations inline it.
CALLS = frozenset(
    """
    jit pjit closed_call core_call remat remat2 checkpoint custom_jvp_call
    custom_vjp_call custom_vjp_call_jaxpr core_closed_call composite
    """.split()
)


def inner_jaxpr(eqn: jex.JaxprEqn) -> jex.ClosedJaxpr:
    """The sub-jaxpr of a call-like equation."""
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(name)
        if isinstance(inner, jex.ClosedJaxpr):
            return inner
        if isinstance(inner, jex.Jaxpr):
            return jex.ClosedJaxpr(inner, ())
    raise AssertionError(f"{eqn.primitive.name} has no sub-jaxpr")


def call(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    return walk.closed(inner_jaxpr(eqn), values)


def scan_counts(eqn: jex.JaxprEqn) -> tuple[int, int]:
    """How many operands of a scan are constants, and how many are carried.

    Told by ranks (what is scanned over or stacked has one axis more outside): the
    parameters that say it change with the version of JAX.
    """
    inner = eqn.params["jaxpr"].jaxpr

    def same(outside: Sequence[Any], inside: Sequence[Any]) -> int:
        pairs = zip(outside, inside, strict=True)
        return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in pairs)

    carries = same(eqn.outvars, inner.outvars)
    return same(eqn.invars, inner.invars) - carries, carries


def scan(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """One decision for all layers: the carry that comes out is the one that went in."""
    params = eqn.params
    consts, carries = scan_counts(eqn)
    sliced = []
    for value in values[consts + carries :]:
        walk.atoms.freeze(value.axes[0], f"scanned over at {walk.where}")
        sliced.append(Value(value.axes[1:], value.pure))
    start = values[consts : consts + carries]
    # A carry depends on the inputs from the second round on, whatever its start.
    moving = [Value(value.axes) for value in start]
    repeat = walk.repeat
    walk.repeat = repeat * params["length"]
    results = walk.closed(params["jaxpr"], [*values[:consts], *moving, *sliced])
    walk.repeat = repeat
    stacked = [Value((None, *value.axes)) for value in results[carries:]]
    return [*_tie(walk, start, results[:carries]), *stacked]


def while_loop(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    params = eqn.params
    of_test, of_body = params["cond_nconsts"], params["body_nconsts"]
    start = values[of_test + of_body :]
    moving = [Value(value.axes) for value in start]
    outer = walk.site
    walk.site = (*outer, 0)
    walk.closed(params["cond_jaxpr"], [*values[:of_test], *moving])
    walk.site = (*outer, 1)
    body = [*values[of_test : of_test + of_body], *moving]
    results = walk.closed(params["body_jaxpr"], body)
    walk.site = outer
    return _tie(walk, start, results)


def cond(walk: Walk, eqn: jex.JaxprEqn, values: Sequence[Value]):
    """All branches run on the same channels and give the same channels."""
    outer, results = walk.site, None
    for number, branch in enumerate(eqn.params["branches"]):
        walk.site = (*outer, number)
        found = walk.closed(branch, values[1:])
        results = found if results is None else _tie(walk, results, found)
    walk.site = outer
    assert results is not None
    return results


def _tie(walk: Walk, before: Sequence[Value], after: Sequence[Value]) -> list[Value]:
    why = f"carried through a loop or branch at {walk.where} without channels"
    return [
        Value(
            tuple(
                walk.atoms.unite(a, b, why)
                for a, b in zip(one.axes, two.axes, strict=True)
            ),
            one.pure and two.pure,
        )
        for one, two in zip(before, after, strict=True)
    ]


RULES = {**dict.fromkeys(CALLS, call), "scan": scan, "while": while_loop, "cond": cond}

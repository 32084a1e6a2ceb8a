"""Runs a traced jaxpr with hooks at its call sites: taps, oracles, statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core as jex

from jaxprune import conv
from jaxprune.graph.interpret import CHECK, Site, is_empty, live
from jaxprune.graph.rules.control import CALLS, inner_jaxpr, scan_counts

# before(site, eqn, operands) -> operands; after(site, eqn, operands, results) -> results
Before = Callable[[Site, jex.JaxprEqn, list[Any]], list[Any]]
After = Callable[[Site, jex.JaxprEqn, list[Any], list[Any]], list[Any]]
Execute = Callable[[Site, jex.JaxprEqn, list[Any]], list[Any]]


class Stop(Exception):
    """Raised by a hook to end an evaluation early."""


def evaluate(
    closed: jex.ClosedJaxpr,
    arguments: Sequence[Any],
    *,
    before: Before | None = None,
    after: After | None = None,
    execute: Execute | None = None,
    loops: bool = False,
    remat: bool = False,
    literals: Mapping[Site, Sequence[Any]] | None = None,
    site: Site = (),
) -> list[Any]:
    """Outputs of the jaxpr; calls are inlined, so custom derivatives are lost.

    Args:
      arguments: flat, as the jaxpr takes them.
      before, after: see the types above; called at every equation but the calls.
      execute: what runs an equation instead of `bind`; it sees none that nothing reads,
        for those need not make sense at other sizes.
      loops: also go into scan, while and cond, which are traced anew around the
        hooks; otherwise they run as they are.
      remat: keep rematerialised calls as such; hooks must not keep arrays then.
      literals: by site, what replaces the literal operands (None leaves one as is, as
        no entry leaves all).
      site: prefix of the sites that the hooks see.
    """
    environment: dict[Any, Any] = {}
    options = {
        "before": before,
        "after": after,
        "execute": execute,
        "loops": loops,
        "remat": remat,
        "literals": literals,
    }

    def read(atom: Any) -> Any:
        if isinstance(atom, jex.Literal):
            return atom.val
        if atom not in environment and is_empty(atom):
            return jnp.zeros(atom.aval.shape, atom.aval.dtype)  # of what was not run
        return environment[atom]

    jaxpr = closed.jaxpr
    environment.update(zip(jaxpr.constvars, closed.consts, strict=True))
    environment.update(zip(jaxpr.invars, arguments, strict=True))
    wanted = live(jaxpr) if execute else [True] * len(jaxpr.eqns)
    for number, eqn in enumerate(jaxpr.eqns):
        if not wanted[number] or eqn.primitive.name == CHECK:
            continue
        here = (*site, number)
        operands = [read(atom) for atom in eqn.invars]
        if literals and here in literals:
            operands = [
                held if new is None else new
                for held, new in zip(operands, literals[here], strict=True)
            ]
        name = eqn.primitive.name
        if remat and name in _REMATS:
            results = _remat(eqn, operands, here, options)
        elif name in CALLS:
            results = evaluate(inner_jaxpr(eqn), operands, site=here, **options)
        elif loops and name in _LOOPS:
            results = _LOOPS[name](eqn, operands, here, options)
        else:
            if before:
                operands = before(here, eqn, operands)
            if execute:
                results = execute(here, eqn, operands)
            else:
                results = bind(eqn, operands)
            if after:
                results = after(here, eqn, operands, results)
        environment.update(zip(eqn.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def bind(
    eqn: jex.JaxprEqn, operands: Sequence[Any], params: Mapping[str, Any] | None = None
) -> list[Any]:
    """Results of one equation, convolutions by this device's fastest way.

    params: those to use instead of the equation's own.
    """
    given = eqn.params if params is None else params
    if eqn.primitive.name == "conv_general_dilated":
        params = {k: v for k, v in given.items() if k != "out_sharding"}
        return [conv.conv_general_dilated(*operands, **params)]
    # JAX changed the form of bind parameters: a mapping, before that a pair.
    found = eqn.primitive.get_bind_params(dict(given))
    functions, options = found if isinstance(found, tuple) else ((), found)
    results = eqn.primitive.bind(*functions, *operands, **options)
    return list(results) if eqn.primitive.multiple_results else [results]


_REMATS = frozenset(["remat", "remat2", "checkpoint"])


def _remat(eqn, operands, site, options) -> list[Any]:
    def run(*arguments):
        return evaluate(inner_jaxpr(eqn), arguments, site=site, **options)

    policy, prevent_cse = eqn.params.get("policy"), eqn.params.get("prevent_cse", True)
    return jax.checkpoint(run, policy=policy, prevent_cse=prevent_cse)(*operands)


def _scan(eqn, operands, site, options) -> list[Any]:
    params = eqn.params
    consts, carries = scan_counts(eqn)
    fixed = operands[:consts]

    def body(carry, sliced):
        arguments = [*fixed, *carry, *sliced]
        results = evaluate(params["jaxpr"], arguments, site=site, **options)
        return results[:carries], results[carries:]

    carry, stacked = jax.lax.scan(
        body,
        operands[consts : consts + carries],
        operands[consts + carries :],
        length=params["length"],
        reverse=params["reverse"],
    )
    return [*carry, *stacked]


def _while(eqn, operands, site, options) -> list[Any]:
    params = eqn.params
    of_test, of_body = params["cond_nconsts"], params["body_nconsts"]
    test, body = operands[:of_test], operands[of_test : of_test + of_body]

    def go_on(carry):
        closed = params["cond_jaxpr"]
        return evaluate(closed, [*test, *carry], site=(*site, 0), **options)[0]

    def step(carry):
        closed = params["body_jaxpr"]
        return evaluate(closed, [*body, *carry], site=(*site, 1), **options)

    return list(jax.lax.while_loop(go_on, step, operands[of_test + of_body :]))


def _cond(eqn, operands, site, options) -> list[Any]:
    def branch(number, closed):
        return lambda *x: evaluate(closed, x, site=(*site, number), **options)

    branches = [branch(k, closed) for k, closed in enumerate(eqn.params["branches"])]
    index = jnp.asarray(operands[0], jnp.int32)
    return list(jax.lax.switch(index, branches, *operands[1:]))


_LOOPS: Mapping[str, Callable[..., list[Any]]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}


def loop(
    eqn: jex.JaxprEqn, operands: list[Any], site: Site, before: Before
) -> list[Any]:
    """Results of one equation that is no call; the hook is called inside of loops."""
    if eqn.primitive.name in _LOOPS:
        options = {"before": before, "loops": True}
        return _LOOPS[eqn.primitive.name](eqn, operands, site, options)
    return bind(eqn, operands)


def sub_jaxprs(eqn: jex.JaxprEqn) -> list[jex.ClosedJaxpr]:
    """The sub-jaxprs that the walk goes into, in the order of its sites."""
    name = eqn.primitive.name
    if name in CALLS:
        return [inner_jaxpr(eqn)]
    if name == "scan":
        return [eqn.params["jaxpr"]]
    if name == "while":
        return [eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]]
    if name == "cond":
        return list(eqn.params["branches"])
    return []


def tree_arguments(variables: Any, inputs: Sequence[Any]) -> list[Any]:
    """The flat arguments of a traced call: leaves of the variables, then inputs."""
    return jax.tree_util.tree_leaves((variables, tuple(inputs)))

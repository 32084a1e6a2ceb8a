"""Why a model could not be traced, in words its user can act on."""

from __future__ import annotations

import os
import re
from typing import Any

import jax

from jaxprune.errors import GraphError, first_line
from jaxprune.graph.interpret import is_user_file

_DATA_DEPENDENT = (
    jax.errors.ConcretizationTypeError,  # TracerBoolConversionError and others too
    jax.errors.NonConcreteBooleanIndexError,
    jax.errors.TracerArrayConversionError,
    jax.errors.TracerIntegerConversionError,
)


def trace_error(error: Exception, variables: Any, inputs: Any) -> GraphError:
    """The error to raise for one that a model raised while it was traced."""
    said = re.sub(r" \(https://\S+\)$", "", first_line(error)).rstrip(".")
    said += _where(error)
    if isinstance(error, _DATA_DEPENDENT):
        return GraphError(
            "the model's shapes or branches depend on the values of arrays, so no "
            f"fixed program can be traced: {said}; expected shapes that follow from "
            "shapes alone. Use jnp.where, lax.cond or a mask of fixed size, or pass "
            f"apply= with a call that leaves that part out{_flag_hint(inputs)}"
        )
    return GraphError(
        f"the model does not run on these variables and inputs: {said}. Found "
        f"{_shapes(variables)}; inputs {_shapes(inputs)}. Pass the whole tree that "
        "the model's init returned (every collection) and an input of the shape it "
        "was made for, or apply= with the right call"
    )


def _flag_hint(inputs: Any) -> str:
    flags = (leaf.dtype == bool and not leaf.shape for leaf in jax.tree.leaves(inputs))
    if not any(flags):
        return ""
    return (
        "; a Python flag among the inputs became an array: state it there instead, "
        "apply=lambda model, variables, x: model.apply(variables, x, True)"
    )


def _where(error: Exception) -> str:
    """The user's innermost line, " at file.py:12 (function)", or ""."""
    found, step = "", error.__traceback__
    while step is not None:
        code = step.tb_frame.f_code
        if is_user_file(code.co_filename):
            name = os.path.basename(code.co_filename)
            found = f" at {name}:{step.tb_lineno} ({code.co_name})"
        step = step.tb_next
    return found


def _shapes(tree: Any, most: int = 3) -> str:
    """Collections with their number of arrays, or the first few shapes."""
    if isinstance(tree, dict) and all(isinstance(v, dict) for v in tree.values()):
        counts = [f"{name} ({len(jax.tree.leaves(v))})" for name, v in tree.items()]
        return f"collections {', '.join(counts) or 'none'}"
    leaves = jax.tree.leaves(tree)
    some = [f"{leaf.dtype}{list(leaf.shape)}" for leaf in leaves[:most]]
    more = f" and {len(leaves) - most} more" if len(leaves) > most else ""
    return f"{', '.join(some) or 'nothing'}{more}"

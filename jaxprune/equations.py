"""What the equations of a slim program must state as those of the original do.

All raise EmissionError with the first difference.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxprune.errors import EmissionError
from jaxprune.graph import Site


def check_operands(wires, expected, found, name: str, here: Site) -> None:
    """Both programs feed the same results on."""
    for a, b in zip(expected, found, strict=True):
        alike = isinstance(a, jex.Literal) == isinstance(b, jex.Literal)
        if not alike or not (isinstance(a, jex.Literal) or wires.get(a) is b):
            raise EmissionError(
                f"the slim model feeds another operand to {name} {here}; a branch in "
                "its source depends on a size that changed. Keep that group whole"
            )


def check_constant(a: Any, b: Any) -> None:
    """Array constants are equal; one that does not vary along an axis may shrink."""
    if a is b or jnp.issubdtype(a.dtype, jax.dtypes.extended):
        return  # PRNG keys have no values to compare
    expected, found = np.asarray(a), np.asarray(b)
    for axis, size in enumerate(found.shape[: expected.ndim]):
        if size < expected.shape[axis]:
            first = np.take(expected, [0], axis)
            if (expected == first).all():
                expected = np.take(expected, range(size), axis)
    if not np.array_equal(expected, found, equal_nan=True):
        raise EmissionError(
            f"a constant array of shape {a.shape} in the source depends on a size that "
            f"changed: found shape {b.shape}, or other values; keep that group whole"
        )


# Parameters that hold sizes; the shapes of the results tell if they followed.
_SIZES = frozenset(
    """shape sizes new_sizes start_indices limit_indices slice_sizes reps
    feature_group_count sharding out_sharding name""".split()
)


def check_params(eqn: jex.JaxprEqn, other: jex.JaxprEqn, here: Site) -> None:
    """All else that an equation states (axes, paddings, lengths) is unchanged."""
    for name, expected in eqn.params.items():
        found = other.params.get(name)
        if found is expected or name in _SIZES or not _plain(expected):
            continue
        if found != expected and repr(found) != repr(expected):  # nan is not nan
            raise EmissionError(
                f"{name} of {eqn.primitive.name} {here} depends on a size that "
                f"changed: expected {expected}, found {found}; keep that group whole"
            )


def _plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_plain, value))
    simple = (type(None), bool, int, float, str, np.integer, np.dtype)
    return isinstance(value, simple) or type(value).__name__.endswith(
        "DimensionNumbers"
    )

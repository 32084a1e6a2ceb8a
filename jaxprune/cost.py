"""What a model costs on this device: measured latency, bytes of its variables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.frameworks import handle_of


def latency_ms(
    model: Any,
    variables: Any,
    x: Any,
    *,
    apply: Callable[..., Any] | None = None,
    repeats: int = 20,
    seconds: float = 2.0,
) -> float:
    """Median milliseconds of one compiled inference call on the inputs x.

    As `time_ms` of the model's call.
    """
    handle = handle_of(model, apply)
    inputs = x if isinstance(x, tuple) else (x,)
    return time_ms(
        lambda v, i: handle(v, *i), variables, inputs, repeats=repeats, seconds=seconds
    )


def time_ms(
    function: Callable[..., Any],
    *arguments: Any,
    repeats: int = 20,
    seconds: float = 2.0,
) -> float:
    """Median milliseconds of one compiled call of a function on this device.

    The program is compiled ahead of time and run twice before the clock starts; each
    run is waited for. It is repeated `repeats` times, or for `seconds`, at least three
    times.

    Args:
      arguments: trees of arrays; zeros stand for ShapeDtypeStructs.
    """
    given = jax.device_put(jax.tree.map(_array, arguments))
    run = jax.jit(function).lower(*given).compile()
    for _ in range(2):
        jax.block_until_ready(run(*given))
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < repeats and (len(times) < 3 or time.perf_counter() < stop):
        start = time.perf_counter()
        jax.block_until_ready(run(*given))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def _array(leaf: Any) -> Any:
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.split(jax.random.key(0), leaf.shape)
    return jnp.zeros(leaf.shape, leaf.dtype)


def tree_bytes(variables: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))

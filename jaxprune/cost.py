"""What a model costs on this device: measured latency, bytes of its variables."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

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

    The program is compiled ahead of time and run twice before the clock starts; each
    run is waited for. It is repeated `repeats` times, or for `seconds`.
    """
    handle = handle_of(model, apply)
    inputs = x if isinstance(x, tuple) else (x,)
    variables, inputs = jax.device_put((variables, inputs))
    run = jax.jit(lambda v, i: handle(v, *i)).lower(variables, inputs).compile()
    for _ in range(2):
        jax.block_until_ready(run(variables, inputs))
    times: list[float] = []
    stop = time.perf_counter() + seconds
    while len(times) < repeats and (len(times) < 3 or time.perf_counter() < stop):
        start = time.perf_counter()
        jax.block_until_ready(run(variables, inputs))
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def tree_bytes(variables: Any) -> int:
    """Bytes of all arrays of a tree."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(variables))

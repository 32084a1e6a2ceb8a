"""Sums in two float32 words, so that long streams add up as if in float64.

The error-free transformation is Knuth's two-sum (TAOCP 2, 4.2.2); it needs no
float64 hardware and survives jit, because XLA does not reassociate floats.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def two_sum(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(s, e) with s = fl(a + b) and s + e = a + b exactly."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def add(
    high: jax.Array, low: jax.Array, value: jax.Array, value_low: jax.Array | float = 0
) -> tuple[jax.Array, jax.Array]:
    """The two-word sum (high, low) + (value, value_low), renormalised."""
    s, e = two_sum(high, value)
    return two_sum(s, e + (low + value_low))


def psum(
    high: jax.Array, low: jax.Array, axis_name: str
) -> tuple[jax.Array, jax.Array]:
    """The two-word sum over the devices of `axis_name`.

    A plain psum of `high` would round. Here each device splits it on a common
    grid (Rump, Ogita, Oishi 2008, accurate summation): the coarse parts add up
    without any rounding and the fine parts go into the low word.
    """
    devices = jax.lax.psum(1, axis_name)
    largest = jax.lax.pmax(jnp.max(jnp.abs(high), initial=0.0), axis_name)
    # A power of two above devices * largest, so that `coarse` sums stay below it.
    grid = jnp.exp2(jnp.ceil(jnp.log2(jnp.maximum(largest, 1e-30) * 2 * devices)))
    coarse = (high + grid) - grid
    fine = jax.lax.psum((high - coarse) + low, axis_name)
    return two_sum(jax.lax.psum(coarse, axis_name), fine)

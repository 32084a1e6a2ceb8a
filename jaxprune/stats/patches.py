"""Patches that a convolution reads, as rows of a matrix, at chosen output positions."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Padding = str | Sequence[tuple[int, int]]


def gather_patches(
    x: jax.Array,
    positions: jax.Array,
    *,
    window: Sequence[int],
    strides: Sequence[int] | None = None,
    padding: Padding = "VALID",
    rhs_dilation: Sequence[int] | None = None,
    lhs_dilation: Sequence[int] | None = None,
) -> jax.Array:
    """Rows (B * P, prod(window) * C): what the kernel multiplies at each position.

    A convolution's output at `positions` equals rows @ kernel.reshape(-1, O) for
    a kernel (*window, C, O): row entries run over the window, then channels.

    Args:
      x: (B, *spatial, C) with 1, 2 or 3 (any number of) spatial axes.
      positions: int (P, nd) for all images or (B, P, nd), of the OUTPUT.
      padding: "SAME", "VALID" or (low, high) per spatial axis, as in
        jax.lax.conv_general_dilated.
      lhs_dilation: as there; above 1 in transposed convolutions.
    """
    nd = len(window)
    strides = tuple(strides or (1,) * nd)
    rhs = tuple(rhs_dilation or (1,) * nd)
    lhs = tuple(lhs_dilation or (1,) * nd)
    dilated = [(n - 1) * d + 1 for n, d in zip(x.shape[1:-1], lhs, strict=True)]
    if isinstance(padding, str):
        reach = [(k - 1) * d + 1 for k, d in zip(window, rhs, strict=True)]
        padding = jax.lax.padtype_to_pads(dilated, reach, strides, padding)
    config = [(0, 0, 0)]
    config += [(lo, hi, d - 1) for (lo, hi), d in zip(padding, lhs, strict=True)]
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [*config, (0, 0, 0)])
    spatial = x.shape[1:-1]
    steps = np.cumprod((1, *spatial[:0:-1]))[::-1]
    offsets = np.zeros((1,), np.int64)
    for size, dilation, step in zip(window, rhs, steps, strict=True):
        offsets = (offsets[:, None] + np.arange(size) * dilation * step).reshape(-1)
    starts = (positions * jnp.asarray(np.multiply(strides, steps))).sum(-1)
    index = starts[..., None] + jnp.asarray(offsets)  # (P, K) or (B, P, K)
    flat = x.reshape(x.shape[0], math.prod(spatial), x.shape[-1])
    if index.ndim == 2:
        taken = jnp.take(flat, index, axis=1)
    else:
        taken = jax.vmap(lambda image, rows: image[rows])(flat, index)
    return taken.reshape(-1, len(offsets) * x.shape[-1])


def gather_positions(y: jax.Array, positions: jax.Array) -> jax.Array:
    """Rows (B * P, N) of y (B, *spatial, N) at `positions` (P, nd) or (B, P, nd)."""
    return gather_patches(y, positions, window=(1,) * (y.ndim - 2))


def sample_positions(
    key: jax.Array, out_spatial: Sequence[int], count: int | None
) -> jax.Array:
    """Int (P, nd): distinct positions of an output map, each as likely as any other.

    One of each of P equal runs in raster order, from a random start on.

    Args:
      count: P; None, or at least the number of positions, takes all of them once.
    """
    total = math.prod(out_spatial)
    if count is None or count >= total:
        flat = jnp.arange(total)
    else:
        starts = np.arange(count + 1) * total // count
        first, within = jax.random.split(key)
        step = jax.random.randint(within, (count,), 0, np.diff(starts))
        shift = jax.random.randint(first, (), 0, total)
        flat = (starts[:-1] + step + shift) % total
    return jnp.stack(jnp.unravel_index(flat, tuple(out_spatial)), axis=-1)


def example_positions(
    keys: jax.Array, out_spatial: Sequence[int], count: int | None
) -> jax.Array:
    """`sample_positions` of every example, (B, P, nd), or (P, nd) where all are taken.

    Args:
      keys: (B,), one for each example.
    """
    if count is None or count >= math.prod(out_spatial):
        return sample_positions(keys[0], out_spatial, None)
    return jax.vmap(lambda key: sample_positions(key, out_spatial, count))(keys)

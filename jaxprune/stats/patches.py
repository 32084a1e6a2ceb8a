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


def example_positions(
    keys: jax.Array, out_spatial: Sequence[int], count: int | None
) -> jax.Array:
    """Int (B, P, nd): distinct positions of an output map for every example.

    One of each of P equal runs in raster order, from a random start on: each position
    is as likely as any other. Where all are taken, they are (P, nd), for all examples.

    Args:
      keys: (B,), one for each example.
      count: P; None, or at least the number of positions, takes all of them once.
    """
    total = math.prod(out_spatial)
    if count is None or count >= total:
        every = np.indices(tuple(out_spatial)).reshape(len(out_spatial), total)
        return jnp.asarray(every.T)
    starts = np.arange(count + 1) * total // count
    return _sampled(keys, starts, np.asarray(out_spatial))


@jax.jit
def _sampled(keys: jax.Array, starts: jax.Array, sizes: jax.Array) -> jax.Array:
    """`example_positions` from the starts of the runs and the end, (P + 1,).

    Sizes are data: one program, which takes longer to compile than most layers, draws
    for maps of all sizes.
    """

    def one(key: jax.Array) -> jax.Array:
        first, within = jax.random.split(key)
        step = jax.random.randint(within, (len(starts) - 1,), 0, jnp.diff(starts))
        shift = jax.random.randint(first, (), 0, starts[-1])
        return (starts[:-1] + step + shift) % starts[-1]

    flat, index = jax.vmap(one)(keys), []
    for axis in reversed(range(len(sizes))):
        index.append(flat % sizes[axis])
        flat //= sizes[axis]
    return jnp.stack(index[::-1], axis=-1)

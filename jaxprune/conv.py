"""A convolution and a max pool that stay fast where XLA:CPU's are slow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

# Output positions up to which matrix products win. On two CPU cores, 3x3 kernels
# and 512 channels, XLA:CPU runs convolutions at 2 GFLOP/s on a 2x2 map and at 190
# on 3x3 and 4x4 maps (benchmarks/tiny_map_conv.py --maps).
MAX_POSITIONS = 4

_NHWC_HWIO = lax.ConvDimensionNumbers((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2))
# JAX makes the value a part of its trace and compilation cache keys, so a function
# traced before with the other setting is traced anew.
_plain = jax.make_user_context(False)


def plain_convolutions() -> AbstractContextManager[None]:
    """A context in which convolutions and pools are XLA's own, for graph tracing.

    Holds for the thread that enters it. Functions under `jax.jit` that were traced
    outside are traced again inside.
    """
    return _plain(True)


def conv_general_dilated(
    lhs: jax.Array,
    rhs: jax.Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    out_sharding: Any = None,
) -> jax.Array:
    """The convolution of `lhs` (N, H, W, I) with `rhs` (kh, kw, I, O): (N, H', W', O).

    Takes and returns what `jax.lax.conv_general_dilated` does, for any layout, and
    can be given to `flax.linen.Conv(conv_general_dilated=...)` or called with the
    parameters of a convolution's equation in a jaxpr. On the CPU backend, NHWC maps
    of at most `MAX_POSITIONS` outputs, without groups and dilation, are computed as
    matrix products (see `_by_position`); all else goes to `lax`.
    """
    if (
        _rewrites()
        and batch_group_count == feature_group_count == 1
        and out_sharding is None
        and set(lhs_dilation or (1,)) == set(rhs_dilation or (1,)) == {1}
        and jnp.ndim(lhs) == jnp.ndim(rhs) == 4
        and lhs.dtype == rhs.dtype
        and _layout(lhs, rhs, dimension_numbers) == _NHWC_HWIO
        and lhs.shape[3] == rhs.shape[2]
    ):
        if isinstance(padding, str):
            pads = lax.padtype_to_pads(
                lhs.shape[1:3], rhs.shape[:2], window_strides, padding
            )
        else:
            pads = padding
        windows = [
            _windows(*sizes)
            for sizes in zip(
                lhs.shape[1:3], rhs.shape[:2], window_strides, pads, strict=True
            )
        ]
        positions = len(windows[0]) * len(windows[1])
        if 1 <= positions <= MAX_POSITIONS and rhs.shape[:2] != (1, 1):
            return _by_position(lhs, rhs, windows, precision, preferred_element_type)
    return lax.conv_general_dilated(
        lhs,
        rhs,
        window_strides,
        padding,
        lhs_dilation=lhs_dilation,
        rhs_dilation=rhs_dilation,
        dimension_numbers=dimension_numbers,
        feature_group_count=feature_group_count,
        batch_group_count=batch_group_count,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )


def max_pool_2x2(x: jax.Array) -> jax.Array:
    """The maxima of the 2x2 blocks of `x` (N, H, W, C): (N, H // 2, W // 2, C).

    On the CPU backend as a maximum of four strided slices, whose gradient is 15 times
    as fast as that of XLA's pooling (5 against 86 ms at 64 x 32 x 32 x 64, 2 cores).
    There the gradient of tied maxima is shared between them; behind a ReLU that
    makes no difference, since ties are at zero.
    """
    if not _rewrites():
        return nn.max_pool(x, (2, 2), strides=(2, 2))
    bottom, right = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    top_row = jnp.maximum(x[:, :bottom:2, :right:2], x[:, :bottom:2, 1:right:2])
    low_row = jnp.maximum(x[:, 1:bottom:2, :right:2], x[:, 1:bottom:2, 1:right:2])
    return jnp.maximum(top_row, low_row)


def _rewrites() -> bool:
    return not _plain.value and jax.default_backend() == "cpu"


def _layout(lhs, rhs, dimension_numbers) -> lax.ConvDimensionNumbers:
    if isinstance(dimension_numbers, lax.ConvDimensionNumbers):
        return dimension_numbers
    return lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)


def _windows(
    size: int, kernel: int, stride: int, pads: tuple[int, int]
) -> list[tuple[int, int, int]]:
    """Per output position along one axis: input start, input stop, first tap."""
    low, high = pads
    windows = []
    for start in range(-low, size + high - kernel + 1, stride):
        first = min(max(start, 0), size)
        windows.append((first, max(min(start + kernel, size), first), first - start))
    return windows


def _by_position(lhs, rhs, windows, precision, preferred_element_type) -> jax.Array:
    """One matrix product per output position, over the taps that hit the input.

    Does no product with padding: 16 blocks of (N, I) x (I, O) for a 3x3 kernel on a
    2x2 map, where the padded form does 36 and a convolution of 1x1 maps only 1 of 9.
    A single accumulation per output keeps bfloat16 as accurate as `lax`.
    """
    outputs = []
    for (top, bottom, row), (left, right, column) in itertools.product(*windows):
        height, width = bottom - top, right - left
        pixels = lhs[:, top:bottom, left:right]
        taps = rhs[row : row + height, column : column + width]
        outputs.append(
            lax.dot_general(
                pixels.reshape(lhs.shape[0], height * width * lhs.shape[3]),
                taps.reshape(height * width * rhs.shape[2], rhs.shape[3]),
                (((1,), (0,)), ((), ())),
                precision=precision,
                preferred_element_type=preferred_element_type,
            )
        )
    shape = (lhs.shape[0], len(windows[0]), len(windows[1]), rhs.shape[3])
    return jnp.stack(outputs, axis=1).reshape(shape)

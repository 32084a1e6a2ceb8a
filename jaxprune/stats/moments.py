"""Second moments of a layer's inputs and outputs: all that CPLI and the refit need."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.stats import compensated

# Rows of one float32 matrix product: longer ones lose digits (the error grows with their square root).
BLOCK = 1024
Rows = slice | np.ndarray  # some of the inputs, or all


class Moments(NamedTuple):
    """Means and centred second moments of inputs x (R,) and targets y (N,).

    Centred, because uncentred float32 sums lose the variance of features whose mean
    is large. Each entry is float32 in two words: the field and its entry in `low`, of
    the same shape; `covariances` adds them up. Memory does not grow with samples.

    Attributes:
      count: (), the number of samples, or the sum of their weights.
      mean_x: (R,).
      mean_y: (N,).
      xx: (R, R), sum of (x - mean_x)(x - mean_x)^T.
      xy: (R, N), sum of (x - mean_x)(y - mean_y)^T.
      yy: (N,), sum of (y - mean_y)^2.
      low: the low words of the six, in this order.
    """

    count: Any
    mean_x: Any
    mean_y: Any
    xx: Any
    xy: Any
    yy: Any
    low: tuple[Any, ...]


def zeros(rows: int, outputs: int, *, second: bool = True) -> Moments:
    """Moments of no sample, for R = `rows` inputs and N = `outputs` targets.

    Args:
      second: False leaves xx and xy out, for the means alone: (0, 0) and (0, N), and
        `update` keeps them so.
    """
    size = rows if second else 0
    shapes = ((), (rows,), (outputs,), (size, size), (size, outputs), (outputs,))
    # Two allocations: a donated buffer must not be passed twice.
    words = [tuple(jnp.zeros(s, jnp.float32) for s in shapes) for _ in range(2)]
    return Moments(*words[0], low=words[1])


def update(
    moments: Moments, x: jax.Array, y: jax.Array, weight: jax.Array | None = None
) -> Moments:
    """Moments with the samples x (n, R), y (n, N) added; jittable.

    Args:
      weight: (n,), how often each sample counts: 0 for the padding of a last
        batch, so that shapes stay static. Default 1.
    """
    if weight is None:
        weight = jnp.ones(x.shape[0])
    rows, size = x.shape[0], len(moments.xx)
    whole = rows // BLOCK if rows > 4 * BLOCK else 0  # few are faster one by one

    def add(moments: Moments, block: list[jax.Array]) -> tuple[Moments, None]:
        x, y, weight = block
        return merge(moments, _of_block(x, y, weight, size)), None

    if whole:
        blocks = [
            a[: whole * BLOCK].reshape(whole, BLOCK, *a.shape[1:])
            for a in (x, y, weight)
        ]
        moments, _ = jax.lax.scan(add, moments, blocks)
    for start in range(whole * BLOCK, rows, BLOCK):
        block = slice(start, start + BLOCK)
        moments, _ = add(moments, [x[block], y[block], weight[block]])
    return moments


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the samples of `a` and `b` together (Chan, Golub, LeVeque 1983)."""
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1e-30)
    dx = (b.mean_x - a.mean_x) + (b.low[1] - a.low[1])
    dy = (b.mean_y - a.mean_y) + (b.low[2] - a.low[2])
    between = _between(dx[: len(a.xx)], dy, a.count * share)
    steps = (b.count, dx * share, dy * share, *b[3:6])
    spread = (low + d for low, d in zip(b.low[3:], between, strict=True))
    lows = (b.low[0], 0.0, 0.0, *spread)
    pairs = [
        compensated.add(*operands)
        for operands in zip(a[:6], a.low, steps, lows, strict=True)
    ]
    return Moments(*(p[0] for p in pairs), low=tuple(p[1] for p in pairs))


def psum(moments: Moments, axis_name: str) -> Moments:
    """Moments over all devices of the mapped axis; inside shard_map or pmap."""
    total, total_low = compensated.psum(moments.count, moments.low[0], axis_name)
    share = moments.count / jnp.maximum(total, 1e-30)
    high, low = moments[:6], moments.low
    means = [
        compensated.psum(high[i] * share, low[i] * share, axis_name) for i in (1, 2)
    ]
    dx, dy = (
        (high[i] - mean[0]) + (low[i] - mean[1])
        for i, mean in zip((1, 2), means, strict=True)
    )
    between = _between(dx[: len(moments.xx)], dy, moments.count)
    rest = [
        compensated.psum(high[i], low[i] + extra, axis_name)
        for i, extra in zip((3, 4, 5), between, strict=True)
    ]
    pairs = [(total, total_low), *means, *rest]
    return Moments(*(p[0] for p in pairs), low=tuple(p[1] for p in pairs))


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    # HIGHEST: the default would multiply in TF32 or bfloat16 on accelerators.
    return jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST)


def _between(dx: jax.Array, dy: jax.Array, weight: jax.Array) -> tuple[Any, Any, Any]:
    """What means that lie (dx, dy) apart add to xx, xy and yy."""
    return jnp.outer(dx, dx) * weight, jnp.outer(dx, dy) * weight, dy * dy * weight


def _of_block(x: jax.Array, y: jax.Array, weight: jax.Array, size: int) -> Moments:
    """Moments of one block, the second ones of the first `size` inputs."""
    x, y, weight = (a.astype(jnp.float32) for a in (x, y, weight))
    count = weight.sum()
    share = (weight / jnp.maximum(count, 1e-30))[:, None]
    mean_x, mean_y = (x * share).sum(0), (y * share).sum(0)
    x, y = x - mean_x, y - mean_y
    wx, wy = x * weight[:, None], y * weight[:, None]
    # The rounding of the means, taken from the centred samples.
    low = (jnp.zeros(()), (x * share).sum(0), (y * share).sum(0))
    wx, x = wx[:, :size], x[:, :size]
    second = _dot(wx, x), _dot(wx, y), (wy * y).sum(0)
    return Moments(
        count, mean_x, mean_y, *second, low=(*low, *map(jnp.zeros_like, second))
    )


class Covariances(NamedTuple):
    """Float64 means and second moments divided by the count, on the host.

    Attributes:
      count: float.
      mean_x, mean_y: (R,), (N,); zeros where not centred.
      xx, xy, yy: (R, R), (R, N), (N,).
    """

    count: float
    mean_x: np.ndarray
    mean_y: np.ndarray
    xx: np.ndarray
    xy: np.ndarray
    yy: np.ndarray


def covariances(
    moments: Moments, *, centred: bool = True, rows: np.ndarray | None = None
) -> Covariances:
    """Means and (co)variances, population form; no sample at all gives zeros.

    Args:
      centred: second moments about the means, which an intercept takes; False: about
        zero, and the means are reported as zero.
      rows: int (K,), for the inputs x[rows] alone; default all.
    """
    among: Rows = slice(None) if rows is None else rows
    mean_x, mean_y = _float64(moments, 1, among), _float64(moments, 2)
    if not centred:
        mean_x, mean_y = np.zeros_like(mean_x), np.zeros_like(mean_y)
    return Covariances(
        float(_float64(moments, 0)),
        mean_x,
        mean_y,
        input_covariances(moments, among, among, centred=centred),
        *target_covariances(moments, among, centred=centred),
    )


def input_covariances(
    moments: Moments, rows: Rows, columns: Rows, *, centred: bool = True
) -> np.ndarray:
    """A part of `covariances(moments).xx`, float64: these rows, these columns.

    What is left out is never made: all of it is
    four times the float32 moments.
    """
    part = _float64(moments, 3, rows, columns)
    part /= max(float(_float64(moments, 0)), 1e-300)
    if not centred:
        mean = _float64(moments, 1)
        part += np.outer(mean[rows], mean[columns])
    return part


def target_covariances(
    moments: Moments, rows: Rows = slice(None), *, centred: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """(xy of these rows, yy) as in `covariances(moments)`, float64."""
    n = max(float(_float64(moments, 0)), 1e-300)
    xy, yy = _float64(moments, 4, rows), _float64(moments, 5)
    xy /= n
    yy /= n
    if not centred:
        mean_y = _float64(moments, 2)
        xy += np.outer(_float64(moments, 1, rows), mean_y)
        yy += mean_y**2
    return xy, yy


def _float64(moments: Moments, field: int, *index) -> np.ndarray:
    """Both words of a field, at one index for each of its first axes."""
    words = [np.asarray(moments[field]), np.asarray(moments.low[field])]
    for axis, chosen in enumerate(index):
        words = [word[(slice(None),) * axis + (chosen,)] for word in words]
    return np.add(*words, dtype=np.float64)

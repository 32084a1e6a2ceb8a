"""Second moments of a layer's inputs and outputs: all that CPLI and the refit need."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.stats import compensated


class Moments(NamedTuple):
    """Sums over n samples of inputs x (R,) and targets y (N,).

    Each sum is float32 in two words: the field and its entry in `low`, of the
    same shape; `to_float64` adds them up. Memory does not grow with n.

    Attributes:
      count: (), the number of samples, or the sum of their weights.
      sum_x: (R,).
      sum_y: (N,).
      xtx: (R, R), sum of x x^T.
      xty: (R, N), sum of x y^T.
      yty: (N,), sum of y^2.
      low: the low words of the six sums, in this order.
    """

    count: Any
    sum_x: Any
    sum_y: Any
    xtx: Any
    xty: Any
    yty: Any
    low: tuple[Any, ...] = ()


def zeros(rows: int, outputs: int) -> Moments:
    """Moments of no sample, for R = `rows` inputs and N = `outputs` targets."""
    shapes = ((), (rows,), (outputs,), (rows, rows), (rows, outputs), (outputs,))
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
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    if weight is None:
        weight = jnp.ones(x.shape[0], jnp.float32)
    weight = weight.astype(jnp.float32)
    wx, wy = x * weight[:, None], y * weight[:, None]
    # HIGHEST: the default would multiply in TF32 or bfloat16 on accelerators.
    dot = lambda a, b: jnp.matmul(a.T, b, precision=jax.lax.Precision.HIGHEST)
    batch = (
        weight.sum(),
        wx.sum(0),
        wy.sum(0),
        dot(wx, x),
        dot(wx, y),
        (wy * y).sum(0),
    )
    return _add(moments, batch, (0.0,) * 6)


def merge(a: Moments, b: Moments) -> Moments:
    """Moments of the samples of `a` and `b` together."""
    return _add(a, b[:6], b.low)


def psum(moments: Moments, axis_name: str) -> Moments:
    """Moments over all devices of the mapped axis; inside shard_map or pmap."""
    pairs = [
        compensated.psum(high, low, axis_name)
        for high, low in zip(moments[:6], moments.low, strict=True)
    ]
    return Moments(*(p[0] for p in pairs), low=tuple(p[1] for p in pairs))


def _add(moments: Moments, values: tuple[Any, ...], lows: tuple[Any, ...]) -> Moments:
    pairs = [
        compensated.add(*operands)
        for operands in zip(moments[:6], moments.low, values, lows, strict=True)
    ]
    return Moments(*(p[0] for p in pairs), low=tuple(p[1] for p in pairs))


def to_float64(moments: Moments) -> Moments:
    """The moments as NumPy float64 arrays on the host, both words added; low is ()."""
    high = [np.asarray(a, np.float64) for a in moments[:6]]
    if not moments.low:
        return Moments(*high)
    return Moments(
        *(h + np.asarray(a, np.float64) for h, a in zip(high, moments.low, strict=True))
    )


class Covariances(NamedTuple):
    """Float64 second moments divided by the count, centred if asked.

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


def covariances(moments: Moments, *, centred: bool = True) -> Covariances:
    """Means and (co)variances, population form; no sample at all gives zeros.

    Args:
      centred: subtract the products of the means, as an intercept does.
    """
    m = to_float64(moments)
    n = max(float(m.count), 1e-300)
    mean_x, mean_y = m.sum_x / n, m.sum_y / n
    if not centred:
        mean_x, mean_y = np.zeros_like(mean_x), np.zeros_like(mean_y)
    xx, xy = m.xtx / n, m.xty / n
    if centred:
        xx -= np.outer(mean_x, mean_x)
        xy -= np.outer(mean_x, mean_y)
    yy = np.maximum(m.yty / n - mean_y**2, 0.0)
    return Covariances(float(m.count), mean_x, mean_y, xx, xy, yy)

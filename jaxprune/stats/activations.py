"""Per-channel activation statistics that stream: moments, histograms, correlations."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.errors import ScoreError


class ActivationStats(NamedTuple):
    """Statistics of each channel over every other axis.

    Attributes:
      count: (), samples seen (batch and space together).
      mean: (C,).
      m2: (C,), sum of squared deviations from the mean.
      mean_abs: (C,), mean of |x|.
      zero_fraction: (C,), APoZ (Hu et al. 2016): share of exact zeros.
      min, max: (C,).
    """

    count: Any
    mean: Any
    m2: Any
    mean_abs: Any
    zero_fraction: Any
    min: Any
    max: Any

    @property
    def variance(self) -> Any:
        """(C,), population variance."""
        return self.m2 / jnp.maximum(self.count, 1)


def stats_zeros(channels: int) -> ActivationStats:
    """Statistics of no sample; the identity of `stats_merge`."""
    # Separate arrays: a donated buffer must not be passed twice.
    none, *zero = (jnp.zeros(s, jnp.float32) for s in ((), *[(channels,)] * 4))
    top = jnp.full(channels, jnp.inf, jnp.float32)
    mean, m2, mean_abs, zero_fraction = zero
    return ActivationStats(none, mean, m2, mean_abs, zero_fraction, top, -top)


def stats_update(stats: ActivationStats, x: jax.Array) -> ActivationStats:
    """Statistics with the activations x (..., C) added; jittable."""
    x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    mean = x.mean(0)
    batch = ActivationStats(
        jnp.float32(x.shape[0]),
        mean,
        ((x - mean) ** 2).sum(0),
        jnp.abs(x).mean(0),
        (x == 0).mean(0, dtype=jnp.float32),
        x.min(0),
        x.max(0),
    )
    return stats_merge(stats, batch)


def stats_merge(a: ActivationStats, b: ActivationStats) -> ActivationStats:
    """Statistics of both parts (Chan, Golub, LeVeque 1983)."""
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    blend = lambda p, q: p + (q - p) * share
    delta = b.mean - a.mean
    return ActivationStats(
        count,
        blend(a.mean, b.mean),
        a.m2 + b.m2 + delta**2 * a.count * share,
        blend(a.mean_abs, b.mean_abs),
        blend(a.zero_fraction, b.zero_fraction),
        jnp.minimum(a.min, b.min),
        jnp.maximum(a.max, b.max),
    )


class Comoments(NamedTuple):
    """Means and centred co-moments, from which Pearson correlations follow.

    Attributes:
      count: (), samples.
      mean: (C,).
      outer: (C, C), sum of (x - mean)(x - mean)^T.
    """

    count: Any
    mean: Any
    outer: Any


def comoments_zeros(channels: int) -> Comoments:
    """Co-moments of no sample."""
    return Comoments(
        jnp.zeros((), jnp.float32),
        jnp.zeros(channels, jnp.float32),
        jnp.zeros((channels, channels), jnp.float32),
    )


def comoments_update(moments: Comoments, x: jax.Array) -> Comoments:
    """Co-moments with x (..., C) added: one matrix product; jittable.

    For correlation over space pass the maps (B, H, W, C) as they are, for pooled
    means pass x.mean((1, 2)).
    """
    x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    mean = x.mean(0)
    centred = x - mean
    outer = jnp.matmul(centred.T, centred, precision=jax.lax.Precision.HIGHEST)
    return comoments_merge(moments, Comoments(jnp.float32(x.shape[0]), mean, outer))


def comoments_merge(a: Comoments, b: Comoments) -> Comoments:
    """Co-moments of both parts (Chan, Golub, LeVeque 1983)."""
    count = a.count + b.count
    share = b.count / jnp.maximum(count, 1)
    delta = b.mean - a.mean
    outer = a.outer + b.outer + jnp.outer(delta, delta) * (a.count * share)
    return Comoments(count, a.mean + delta * share, outer)


def pearson(moments: Comoments) -> np.ndarray:
    """(C, C) float64 Pearson correlations in [-1, 1]; 0 for a constant channel.

    A channel counts as constant when its variance is below float32 rounding of its
    mean: what is left then is noise. The diagonal of such a channel is 0 too.
    """
    outer = np.asarray(moments.outer, np.float64)
    n = max(float(moments.count), 1.0)
    variance = np.diagonal(outer) / n
    floor = (np.asarray(moments.mean, np.float64) * 1e-6) ** 2
    alive = variance > np.maximum(floor, 1e-60)
    scale = np.where(alive, 1 / np.sqrt(np.where(alive, variance * n, 1.0)), 0.0)
    return np.clip(outer * scale[:, None] * scale[None, :], -1.0, 1.0)


class Histogram(NamedTuple):
    """Counts of samples in the bins of each channel.

    Attributes:
      edges: (C, K + 1) float32, ascending.
      at_least: (C, K + 1) int32, how many samples are >= each edge.
      count: () int32.
    """

    edges: Any
    at_least: Any
    count: Any


def histogram_zeros(edges: np.ndarray) -> Histogram:
    """An empty histogram on float64 `edges` (C, K + 1).

    Edges are rounded UP to float32, so that comparing float32 samples with them
    gives exactly what comparing with the float64 edges would.
    """
    edges = np.asarray(edges, np.float64)
    rounded = edges.astype(np.float32)
    rounded = np.where(
        rounded < edges, np.nextafter(rounded, np.float32(np.inf)), rounded
    )
    return Histogram(
        jnp.asarray(rounded),
        jnp.zeros(edges.shape, jnp.int32),
        jnp.zeros((), jnp.int32),
    )


def histogram_update(histogram: Histogram, x: jax.Array) -> Histogram:
    """The histogram with x (..., C) counted; jittable."""
    x = x.astype(jnp.float32).reshape(-1, x.shape[-1])
    hits = (x[:, :, None] >= histogram.edges[None]).sum(0, dtype=jnp.int32)
    return Histogram(
        histogram.edges, histogram.at_least + hits, histogram.count + x.shape[0]
    )


def histogram_merge(a: Histogram, b: Histogram) -> Histogram:
    """The histogram of both parts.

    Raises:
      ScoreError: the edges differ.
    """
    if not np.array_equal(np.asarray(a.edges), np.asarray(b.edges)):
        raise ScoreError(
            "histograms with different edges cannot be merged; make both from the "
            "same first-pass ranges"
        )
    return Histogram(a.edges, a.at_least + b.at_least, a.count + b.count)


def histogram_counts(histogram: Histogram) -> np.ndarray:
    """(C, K + 2) int64: samples below the first edge, in each bin, at or past the last.

    Column k is numpy.digitize's class k: edges[k - 1] <= x < edges[k].
    """
    at_least = np.asarray(histogram.at_least, np.int64)
    total = np.full((at_least.shape[0], 1), int(histogram.count), np.int64)
    bounds = np.concatenate([total, at_least, np.zeros_like(total)], axis=1)
    return bounds[:, :-1] - bounds[:, 1:]

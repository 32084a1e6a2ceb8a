"""Criteria from what the channels' feature maps hold; larger = keep, (C,) each.

The statistics are those of jaxprune.stats: one pass, mergeable. Channels are scored
on the output that the consumers read, after the activation function.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.criteria.redundancy import entropies_from_counts
from jaxprune.stats.activations import (
    ActivationStats,
    Comoments,
    Histogram,
    histogram_counts,
    pearson,
)


def activation_mean(stats: ActivationStats) -> jax.Array:
    """(C,): mean |x|, Molchanov et al. 2017 (arXiv:1611.06440), section 2.2."""
    return stats.mean_abs


def activation_variance(stats: ActivationStats) -> jax.Array:
    """(C,): population variance; a constant channel can be folded into a bias."""
    return stats.variance


def apoz(stats: ActivationStats) -> jax.Array:
    """(C,): 1 - the average percentage of zeros, Hu et al. 2016 (arXiv:1607.03250)."""
    return 1.0 - stats.zero_fraction


def entropy(histogram: Histogram) -> np.ndarray:
    """(C,): Shannon entropy in nats, Luo and Wu 2017 (arXiv:1706.05791).

    Meaningful across channels only where they share their bins, see
    `redundancy.shared_edges`.
    """
    return entropies_from_counts(histogram_counts(histogram))


def correlation(moments: Comoments) -> np.ndarray:
    """(C,): - mean |Pearson correlation| with the group's other channels.

    A dead channel correlates with nothing and would come first: it scores -1.
    """
    matrix = np.abs(pearson(moments))
    size = len(matrix)
    dead = np.diagonal(matrix) == 0
    others = (matrix.sum(1) - np.diagonal(matrix)) / max(size - 1, 1)
    return -np.where(dead, 1.0, others)


# Entries of the matrices that `channel_independence` decomposes at a time: 64 MB.
_CHIP_ENTRIES = 1 << 24


@jax.jit
def channel_independence(maps: jax.Array) -> jax.Array:
    """(C,): how much the nuclear norm falls when the channel's map is taken out.

    CHIP, Sui et al. 2021 (arXiv:2110.13981): for one image, A (C, H W) holds the maps
    as rows and CI_c = ||A||_* - ||A with row c zeroed||_*; averaged over the images of
    `maps` (B, *spatial, C). C singular value decompositions an image, of a square
    factor of A of n = min(C, H W) rows that has the same singular values.
    """
    size = maps.shape[-1]
    matrices = maps.astype(jnp.float32).reshape(maps.shape[0], -1, size)

    def norm(matrix):
        values = jnp.linalg.svd(matrix, compute_uv=False, full_matrices=False)
        return values.sum()

    def one(image):  # (H W, C)
        if image.shape[0] >= size:
            factor = jnp.linalg.qr(image, mode="r")

            def without(channel):
                return factor.at[:, channel].set(0.0)

        else:
            # image^T = Q R; Q without row q has (I - q q^T)^(1/2) in the place of Q.
            q, factor = jnp.linalg.qr(image.T)

            def without(channel):
                row = q[channel]
                square = jnp.minimum(row @ row, 1.0)
                share = (1 - jnp.sqrt(1 - square)) / jnp.maximum(square, 1e-30)
                return factor.T - jnp.outer(factor.T @ row, row) * share

        least = jax.lax.map(
            lambda channel: norm(without(channel)),
            jnp.arange(size),
            batch_size=max(1, _CHIP_ENTRIES // factor.size),
        )
        return norm(factor) - least

    return jax.lax.map(one, matrices).mean(0)

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


@jax.jit
def channel_independence(maps: jax.Array) -> jax.Array:
    """(C,): how much the nuclear norm falls when the channel's map is taken out.

    CHIP, Sui et al. 2021 (arXiv:2110.13981): for one image, A (C, H W) holds the maps
    as rows and CI_c = ||A||_* - ||A with row c zeroed||_*; averaged over the images of
    `maps` (B, *spatial, C). C singular value decompositions an image; where H W > C
    they are of a C x C factor of A, which has the same singular values.
    """
    size = maps.shape[-1]
    matrices = maps.astype(jnp.float32).reshape(maps.shape[0], -1, size)

    def one(image):  # (H W, C)
        if image.shape[0] > size:
            image = jnp.linalg.qr(image, mode="r")

        def norm(keep):
            return jnp.linalg.svd(image * keep, compute_uv=False).sum()

        masks = jnp.ones((size, size)) - jnp.eye(size)
        return norm(jnp.ones(size)) - jax.vmap(norm)(masks)

    return jax.lax.map(one, matrices).mean(0)

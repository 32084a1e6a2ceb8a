"""Importance, then redundancy: entropy of activations, correlated channels, folding.

Seed: the script "pruning based on importance and redundancy" for a Keras VGG-16, of
which `seed_*` give the numbers. The other functions repair what it gets wrong: bins
on each channel's own range cannot see a small channel, the index decides which of a
pair dies, clusters keep several members, and nothing takes a removed channel's place.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from jaxprune.errors import ScoreError

SEED_BINS = 10
SEED_DENSE_SAMPLES = 300


class Redundancy(NamedTuple):
    """Channels that others stand for.

    Attributes:
      removed: int64 (n,), in the order of removal.
      survivor: int64 (n,), the kept channel that stands for each.
      similarity: float64 (n,), |Pearson correlation| of the two.
    """

    removed: np.ndarray
    survivor: np.ndarray
    similarity: np.ndarray


def range_edges(low, high, *, bins: int = SEED_BINS) -> np.ndarray:
    """(C, bins + 1) float64: equal bins on each channel's own range, as numpy's.

    A channel that is constant gets a range of 1 around its value.
    """
    low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
    flat = low == high
    return np.linspace(
        np.where(flat, low - 0.5, low), np.where(flat, high + 0.5, high), bins + 1,
        axis=-1,
    )  # fmt: skip


def shared_edges(mean, variance, *, bins: int = SEED_BINS) -> np.ndarray:
    """(C, bins + 1) float64: equal bins of one width for all channels of a layer.

    The width is that of a typical channel of the layer, the root mean square
    deviation over channels times 6, cut into `bins`; the middle of a bin lies on each
    channel's mean. A near-dead channel falls into that bin and has entropy 0, one with
    large variation fills all: what the seed's bins, scale-free, cannot tell.
    """
    mean, variance = np.asarray(mean, np.float64), np.asarray(variance, np.float64)
    width = 6 * math.sqrt(max(variance.mean(), 1e-60)) / bins
    return mean[:, None] + width * (np.arange(bins + 1) - bins // 2 - 0.5)


def entropies_from_counts(counts: np.ndarray) -> np.ndarray:
    """(C,) Shannon entropy in nats of the classes (C, K); 0 for no sample."""
    counts = np.asarray(counts, np.float64)
    p = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    return -(p * np.log(np.where(p > 0, p, 1.0))).sum(1)


def seed_entropies_from_counts(counts: np.ndarray, samples: int) -> np.ndarray:
    """(C,) the script's entropies, from `stats.histogram_counts` on `range_edges`.

    Classes are numpy.digitize's on the 11 edges of 10 bins: class 0, below the range,
    is always empty, and the maximum alone is class 11. Each class up to the highest
    that occurs counts one sample more than it has; the probabilities are over the
    number of samples and so sum to more than 1.
    """
    counts = np.asarray(counts, np.float64)
    classes = counts.shape[1]
    highest = classes - 1 - np.argmax(counts[:, ::-1] > 0, axis=1)
    p = (counts + 1) / samples
    terms = np.where(np.arange(classes) <= highest[:, None], -p * np.log(p), 0.0)
    return terms.sum(1)


def seed_entropies(activations: np.ndarray) -> np.ndarray:
    """(C,) the script's entropies of pooled activations (N, C), all in memory."""
    x = np.asarray(activations, np.float64)
    edges = range_edges(x.min(0), x.max(0))
    at_least = np.stack([(x >= e).sum(0) for e in edges.T], axis=1)
    total = np.full((len(edges), 1), len(x))
    bounds = np.concatenate([total, at_least, np.zeros_like(total)], axis=1)
    return seed_entropies_from_counts(bounds[:, :-1] - bounds[:, 1:], len(x))


def pearson_matrix(activations: np.ndarray) -> np.ndarray:
    """(C, C) float64 Pearson correlations of activations (N, C); 0 if constant."""
    x = np.asarray(activations, np.float64)
    constant = x.max(0) == x.min(0)
    x = np.where(constant, 0.0, x - x.mean(0))
    x /= np.where(constant, 1.0, np.sqrt((x * x).sum(0)))
    return np.clip(x.T @ x, -1.0, 1.0)


def _pairs(similarity: np.ndarray, threshold: float, alive: np.ndarray):
    """(i, j, value) of all pairs i < j above the threshold, most similar first.

    Ties in scan order: the lower i, then the lower j.
    """
    i, j = np.nonzero(np.triu(similarity > threshold, 1))
    both = alive[i] & alive[j]
    i, j = i[both], j[both]
    order = np.argsort(-similarity[i, j], kind="stable")
    return i[order], j[order], similarity[i, j][order]


def seed_pairs(similarity, *, threshold: float, cap: float, exclude=()) -> Redundancy:
    """The script's pairing for convolutions: most correlated first, lower index dies.

    Take the most correlated pair above `threshold`, remove its lower index, retire
    both; repeat, at most floor(cap * channels that are not excluded) times. One sort
    of the pairs replaces the script's rescan of all pairs for each.

    Args:
      similarity: (C, C); absolute values are taken.
      cap: 0.2 at the first eligible layer and 0.1 more at each next, at most 1; see
        `seed_cap`. 0 exempts the layer.
      exclude: indices already removed by their entropy.
    """
    similarity = np.abs(np.asarray(similarity, np.float64))
    free = _free(len(similarity), exclude)
    most = math.floor(int(free.sum()) * min(cap, 1.0))
    return _retire(_pairs(similarity, threshold, free), free, most)


def pairs(
    similarity, importance, *, threshold: float, most: int | None = None, exclude=()
) -> Redundancy:
    """Pairs, most similar first: the less important dies, the other is retired.

    The seed's greedy rule without its cap, and with importance instead of the index;
    `clusters` also removes the third member of a cluster. Ties: the higher index dies.

    Args: as for `clusters`.
    """
    similarity, importance = _checked(similarity, importance)
    free = _free(importance.size, exclude)
    limit = importance.size if most is None else most
    i, j, value = _retire(_pairs(similarity, threshold, free), free, limit)
    swap = importance[i] >= importance[j]
    return Redundancy(np.where(swap, j, i), np.where(swap, i, j), value)


def seed_dense_pairs(activations, *, threshold: float, exclude=()) -> Redundancy:
    """The script's pairing for Dense layers: scan order, no cap, 300 samples.

    i ascends, then j > i: the first free j above `threshold` retires both, and i is
    removed. Correlations are of the first 300 rows of `activations` (N, C) only.
    """
    x = np.asarray(activations)[:SEED_DENSE_SAMPLES]
    similarity = np.abs(pearson_matrix(x))
    free = _free(len(similarity), exclude)
    above = similarity > threshold
    found = []
    for i in range(len(similarity)):
        if not free[i]:
            continue
        partners = np.flatnonzero(above[i, i + 1 :] & free[i + 1 :])
        if partners.size:
            j = i + 1 + int(partners[0])
            free[[i, j]] = False
            found.append((i, j, similarity[i, j]))
    return _record(found)


def seed_cap(eligible: int) -> float:
    """The share of a layer that may go: 0.2 for the first eligible layer, 0, then 0.1
    more for each next, capped at 1 each time."""
    share = 0.2
    for _ in range(eligible):
        share = min(share, 1.0) + 0.1
    return min(share, 1.0)


def _free(size: int, exclude) -> np.ndarray:
    free = np.ones(size, bool)
    free[np.asarray(exclude, np.int64)] = False
    return free


def _retire(pairs, free: np.ndarray, most: int) -> Redundancy:
    free, found = free.copy(), []
    for i, j, value in zip(*pairs, strict=True):
        if len(found) >= most:
            break
        if free[i] and free[j]:
            free[[i, j]] = False
            found.append((i, j, value))
    return _record(found)


def _record(found) -> Redundancy:
    removed, survivor, value = zip(*found, strict=True) if found else ((), (), ())
    return Redundancy(
        np.asarray(removed, np.int64),
        np.asarray(survivor, np.int64),
        np.asarray(value, np.float64),
    )


def clusters(
    similarity, importance, *, threshold: float, most: int | None = None, exclude=()
) -> Redundancy:
    """Channels whose twin, the most important of their cluster, can stand for them.

    In the order of importance, each channel that is still free survives and takes
    with it every free channel more similar to it than `threshold`: every member is
    close to its survivor itself, not through a chain of others. A channel between two
    survivors goes to the more similar. Removed in the order of similarity, most
    similar first, at most `most`; those over the limit stay. Ties: lower index.

    Args:
      similarity: (C, C) correlations; absolute values are taken, because a negative
        twin folds as well as a positive one.
      importance: (C,), larger survives: any criterion.
      exclude: indices that are already removed: they neither survive nor count.

    Raises:
      ScoreError: shapes that do not fit, or NaN.
    """
    similarity, importance = _checked(similarity, importance)
    size = importance.size
    free = _free(size, exclude)
    survives = np.zeros(size, bool)
    above = similarity > threshold
    for channel in np.lexsort((np.arange(size), -importance)):
        if free[channel]:
            free &= ~above[channel]
            free[channel] = False
            survives[channel] = True
    out = _free(size, exclude) & ~survives
    removed = np.flatnonzero(out)
    heads = np.flatnonzero(survives)
    if not removed.size:
        return _record(())
    # Only a survivor of higher importance may stand for a channel.
    allowed = similarity[np.ix_(removed, heads)].copy()
    allowed[importance[heads][None] < importance[removed][:, None]] = -1
    best = np.argmax(allowed, axis=1)
    value = allowed[np.arange(removed.size), best]
    order = np.argsort(-value, kind="stable")[: size if most is None else most]
    return Redundancy(removed[order], heads[best[order]], value[order])


def _checked(similarity, importance) -> tuple[np.ndarray, np.ndarray]:
    similarity = np.abs(np.asarray(similarity, np.float64))
    importance = np.asarray(importance, np.float64)
    size = importance.size
    if similarity.shape != (size, size) or np.isnan(importance).any():
        raise ScoreError(
            "twins are found from similarity (C, C) and importance (C,) without NaN; "
            f"found {similarity.shape} and {importance.shape}"
        )
    return similarity, importance


class Fold(NamedTuple):
    """a_removed ~ alpha * a_survivor + gamma, the least-squares line.

    Attributes:
      alpha, gamma: (n,) float64.
      error: (n,) float64, share of the removed channel's variance not explained.
    """

    alpha: np.ndarray
    gamma: np.ndarray
    error: np.ndarray


def fold_coefficients(mean, covariance, redundancy: Redundancy) -> Fold:
    """The lines by which survivors take over what the removed channels gave.

    Consumers then read W_survivor += alpha W_removed and bias += gamma W_removed
    (summed over the window; exact for VALID convolutions, and inside the border for
    padded ones).

    Args:
      mean, covariance: (C,), (C, C) of the activations, population form.
    """
    mean = np.asarray(mean, np.float64)
    covariance = np.asarray(covariance, np.float64)
    j, i = redundancy.removed, redundancy.survivor
    variance = np.diagonal(covariance)
    shared = covariance[i, j]
    usable = variance[i] > 0
    alpha = np.where(usable, shared / np.where(usable, variance[i], 1.0), 0.0)
    left = variance[j] - alpha * shared
    error = np.where(
        variance[j] > 0, left / np.where(variance[j] > 0, variance[j], 1), 0
    )
    return Fold(alpha, mean[j] - alpha * mean[i], np.maximum(error, 0.0))


class SeedLayer(NamedTuple):
    """What the script's MAC count sees of a layer.

    Attributes:
      kind: "conv" or "dense".
      kernel: window edge of a convolution; 1 for dense.
      inputs, outputs: channels or units before pruning.
      height, width: of the output map, before any pooling; 1 for dense.
      kept: outputs that are left.
    """

    kind: str
    kernel: int
    inputs: int
    outputs: int
    height: int
    width: int
    kept: int


def seed_pruning_ratio(layers: list[SeedLayer], *, image_channels: int = 3) -> float:
    """The script's ratio: MACs before over MACs after, K K Cin H W Cout each.

    As there: both totals start at 1, the classifier is not among `layers`, and the
    first Dense layer's pruned cost takes its inputs from the map BEFORE the last
    pooling (kept * H * W), so the ratio is somewhat smaller than the true one.
    """
    before, after = 1, 1
    channels, values = image_channels, 0
    for layer in layers:
        before += (
            layer.kernel**2 * layer.inputs * layer.height * layer.width * layer.outputs
        )
        if layer.kind == "conv":
            area = layer.height * layer.width
            after += layer.kernel**2 * channels * area * layer.kept
            channels, values = layer.kept, layer.kept * area
        else:
            after += values * layer.kept
            values = layer.kept
    return before / after

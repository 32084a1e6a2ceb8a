"""The seed script's numbers against plain NumPy loops; planted twins by default."""

import math
import time

import numpy as np
import pytest

from jaxprune.criteria import redundancy as red
from jaxprune.errors import ScoreError
from jaxprune.stats import activations as stats


def activations(samples=800, channels=30, seed=0):
    rng = np.random.default_rng(seed)
    x = np.maximum(rng.normal(size=(samples, 8)) @ rng.normal(size=(8, channels)), 0)
    x += 0.1 * rng.uniform(size=x.shape)
    x[:, 3] = 0  # dead
    x[:, 7] = 0.25  # constant
    x[:, 9] = np.where(np.arange(samples) < 3, 50, np.abs(rng.normal(size=samples)))
    return x.astype(np.float32).astype(np.float64)


def plain_entropy(column):
    """The description, one channel: histogram edges, digitize, bincount + 1."""
    _, edges = np.histogram(column, bins=10)
    p = (np.bincount(np.digitize(column, edges)) + 1) / len(column)
    return float(np.sum(-np.log(p) * p))


def plain_correlation(x, i, j):
    a, b = x[:, i] - x[:, i].mean(), x[:, j] - x[:, j].mean()
    with np.errstate(invalid="ignore", divide="ignore"):
        value = abs(a @ b / np.sqrt((a @ a) * (b @ b)))
    return min(value, 1.0)


def plain_conv_pairs(x, threshold, cap, gone):
    size = x.shape[1]
    table = np.zeros((size, size))
    for i in range(size):
        for j in range(i, size):
            if i not in gone and j not in gone:
                table[i, j] = plain_correlation(x, i, j)
    processed, removed = list(gone), []
    for _ in range(math.floor((size - len(gone)) * min(1, cap))):
        best, pair = 0, None
        for i in range(size):
            for j in range(i + 1, size):
                free = i not in processed and j not in processed
                if free and table[i, j] > best and table[i, j] > threshold:
                    best, pair = table[i, j], (i, j)
        if pair:
            processed += pair
            removed.append(pair[0])
    return removed


def plain_dense_pairs(x, threshold, gone):
    x, processed, removed = x[:300], list(gone), []
    for i in range(x.shape[1]):
        for j in range(i + 1, x.shape[1]):
            if i in processed or j in processed:
                continue
            if plain_correlation(x, i, j) > threshold:
                processed += [i, j]
                removed.append(i)
    return removed


def test_seed_entropies():
    x = activations()
    expected = [plain_entropy(c) for c in x.T]
    np.testing.assert_allclose(red.seed_entropies(x), expected, rtol=0, atol=1e-12)
    # A dead channel: classes 0 to 6, of which six hold nothing but their + 1.
    dead = -6 / 800 * np.log(1 / 800) - 801 / 800 * np.log(801 / 800)
    assert expected[3] == pytest.approx(dead) and expected[9] < 0.2
    p = np.stack([np.bincount(np.digitize(c, np.histogram(c, 10)[1]), minlength=12)
                  for c in x.T]) / len(x)  # fmt: skip
    textbook = -(p * np.log(np.where(p > 0, p, 1))).sum(1)  # without its smoothing
    assert np.abs(textbook - expected).max() > 1e-3


@pytest.mark.parametrize("split", [25, 300])
def test_seed_entropies_stream(split):
    """Ranges in a first pass, counts in a second: the same to the last bit."""
    x = activations()
    chunks = np.split(x, range(split, len(x), split))
    state = stats.stats_zeros(x.shape[1])
    for chunk in chunks:
        state = stats.stats_update(state, chunk)
    histogram = stats.histogram_zeros(red.range_edges(state.min, state.max))
    for chunk in chunks:
        histogram = stats.histogram_update(histogram, chunk)
    counts = stats.histogram_counts(histogram)
    found = red.seed_entropies_from_counts(counts, len(x))
    np.testing.assert_array_equal(found, red.seed_entropies(x))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold, cap", [(0.8, 0.2), (0.3, 0.4), (0.0, 1.0)])
def test_seed_pairs_of_convolutions(seed, threshold, cap):
    x = activations(samples=200, channels=24, seed=seed)
    gone = np.flatnonzero(red.seed_entropies(x) < 0.5).tolist()
    assert {3, 7} <= set(gone)
    found = red.seed_pairs(
        red.pearson_matrix(x), threshold=threshold, cap=cap, exclude=gone
    )
    assert found.removed.tolist() == plain_conv_pairs(x, threshold, cap, gone)
    assert (found.removed < found.survivor).all()
    assert (
        red.seed_pairs(red.pearson_matrix(x), threshold=0.0, cap=0.0).removed.size == 0
    )


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("threshold", [0.3, 0.8])
def test_seed_pairs_of_dense_layers(seed, threshold):
    x = activations(samples=500, seed=seed)
    gone = [3, 7]
    found = red.seed_dense_pairs(x, threshold=threshold, exclude=gone)
    assert found.removed.tolist() == plain_dense_pairs(x, threshold, gone)
    conv = red.seed_pairs(
        red.pearson_matrix(x[:300]), threshold=threshold, cap=1, exclude=gone
    )
    if threshold < 0.5:
        assert (
            found.removed.tolist() != conv.removed.tolist()
        )  # scan order, not the best


def test_seed_caps():
    caps = [red.seed_cap(k) for k in range(10)]
    expected, share = [], 0.2
    for _ in range(10):
        expected.append(min(1, share))
        share = min(1, share) + 0.1
    np.testing.assert_allclose(caps, expected)
    assert caps[0] == 0.2 and caps[-1] == 1


def test_seed_pruning_ratio():
    layers = [
        red.SeedLayer("conv", 3, 3, 64, 32, 32, 60),
        red.SeedLayer("conv", 3, 64, 512, 2, 2, 500),
        red.SeedLayer("dense", 1, 512, 4096, 1, 1, 1000),
        red.SeedLayer("dense", 1, 4096, 4096, 1, 1, 2000),
    ]
    before = 1 + 9 * 3 * 1024 * 64 + 9 * 64 * 4 * 512 + 512 * 4096 + 4096 * 4096
    after = 1 + 9 * 3 * 1024 * 60 + 9 * 60 * 4 * 500 + (500 * 4) * 1000 + 1000 * 2000
    assert red.seed_pruning_ratio(layers) == before / after
    whole = [layer._replace(kept=layer.outputs) for layer in layers]
    assert red.seed_pruning_ratio(whole) < 1  # its map before the pooling, as there


def planted(samples=4000, seed=0):
    """Independent channels 0-5; copies of them, scaled, negated, shifted; one dead."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(samples, 6))
    return np.concatenate(
        [base, base[:, :1], 5 * base[:, 1:2], 3 - base[:, 2:3], base[:, :1] * 0.5,
         np.zeros((samples, 1))], axis=1,
    )  # fmt: skip


def test_clusters_find_planted_twins_and_keep_the_important():
    x = planted()
    importance = x.std(0).round(6)  # a channel and its negative are equals
    found = red.clusters(red.pearson_matrix(x), importance, threshold=0.9)
    pairs = dict(zip(found.removed.tolist(), found.survivor.tolist(), strict=True))
    assert pairs == {6: 0, 9: 0, 1: 7, 8: 2}  # 7 is the louder of 1 and 7
    lower = red.clusters(red.pearson_matrix(x), -importance, threshold=0.9)
    assert dict(zip(lower.removed, lower.survivor, strict=True))[0] == 9
    seed = red.seed_pairs(red.pearson_matrix(x), threshold=0.9, cap=1)
    assert len(seed.removed) == 3 < len(found.removed)  # pairs leave the third copy
    capped = red.clusters(red.pearson_matrix(x), importance, threshold=0.9, most=2)
    assert capped.removed.size == 2
    spared = red.clusters(
        red.pearson_matrix(x), importance, threshold=0.9, exclude=[0, 10]
    )
    assert not {0, 10} & {*spared.removed.tolist(), *spared.survivor.tolist()}
    none = red.clusters(np.eye(4), np.ones(4), threshold=0.5)
    assert none.removed.size == 0 and none.survivor.dtype == np.int64
    with pytest.raises(ScoreError, match=r"importance \(C,\)"):
        red.clusters(np.eye(4), np.ones(3), threshold=0.5)


def test_pairs_keep_the_important_and_leave_the_third_copy():
    x = planted()
    importance = x.std(0).round(6)
    found = red.pairs(red.pearson_matrix(x), importance, threshold=0.9)
    assert found.removed.size == 3  # of the cluster 0, 6, 9 one pair only
    kept = dict(zip(found.removed.tolist(), found.survivor.tolist(), strict=True))
    assert (importance[found.survivor] >= importance[found.removed]).all()
    assert kept[1] == 7 and kept[8] == 2  # equals: the higher index dies
    reverse = red.pairs(red.pearson_matrix(x), -importance, threshold=0.9)
    assert dict(zip(reverse.removed, reverse.survivor, strict=True))[7] == 1
    assert red.pairs(np.eye(4), np.ones(4), threshold=0.5).removed.size == 0
    capped = red.pairs(red.pearson_matrix(x), importance, threshold=0.9, most=1)
    assert capped.removed.size == 1
    with pytest.raises(ScoreError, match=r"importance \(C,\)"):
        red.pairs(np.eye(4), np.full(4, np.nan), threshold=0.5)


def test_members_are_close_to_their_survivor_not_to_a_chain():
    a = np.deg2rad([0, 20, 40, 60, 80])
    similarity = np.cos(a[:, None] - a[None])
    found = red.clusters(similarity, [5, 4, 3, 2, 1], threshold=0.9)
    assert (found.similarity > 0.9).all()
    assert found.removed.tolist() == [1, 3] or set(found.removed) == {1, 3}
    assert dict(zip(found.removed, found.survivor, strict=True)) == {1: 0, 3: 2}


def test_folding_leaves_the_output_unchanged():
    x = planted()
    rng = np.random.default_rng(1)
    kernel, bias = rng.normal(size=(x.shape[1], 4)), rng.normal(size=4)
    found = red.clusters(red.pearson_matrix(x), x.std(0), threshold=0.9)
    fold = red.fold_coefficients(x.mean(0), np.cov(x.T, bias=True), found)
    np.testing.assert_allclose(fold.error, 0, atol=1e-12)
    new, shift = kernel.copy(), bias.copy()
    for removed, twin, alpha, gamma in zip(
        found.removed, found.survivor, fold.alpha, fold.gamma, strict=True
    ):
        new[twin] += alpha * kernel[removed]
        shift += gamma * kernel[removed]
        new[removed] = 0
    np.testing.assert_allclose(x @ new + shift, x @ kernel + bias, atol=1e-9)
    zeroed = kernel.copy()
    zeroed[found.removed] = 0
    assert np.abs(x @ zeroed - x @ kernel).max() > 1  # without folding


def test_folding_noisy_and_dead_channels():
    rng = np.random.default_rng(0)
    a = rng.normal(size=5000)
    x = np.stack([a, 2 * a + 1 + rng.normal(size=5000), np.zeros(5000)], axis=1)
    pairs = red.Redundancy(np.array([1, 0]), np.array([0, 2]), np.zeros(2))
    fold = red.fold_coefficients(x.mean(0), np.cov(x.T, bias=True), pairs)
    line = np.polyfit(x[:, 0], x[:, 1], 1)
    np.testing.assert_allclose([fold.alpha[0], fold.gamma[0]], line, rtol=1e-6)
    left = (x[:, 1] - np.polyval(line, x[:, 0])).var() / x[:, 1].var()
    assert fold.error[0] == pytest.approx(left, rel=1e-6)
    assert fold.alpha[1] == 0 and fold.error[1] == 1
    assert fold.gamma[1] == pytest.approx(x[:, 0].mean())


def test_wide_layers_are_quick():
    rng = np.random.default_rng(0)
    x = np.maximum(rng.normal(size=(3000, 64)) @ rng.normal(size=(64, 2048)), 0)
    start = time.perf_counter()
    similarity = red.pearson_matrix(x)
    pairs = red.seed_pairs(similarity, threshold=0.3, cap=1.0)
    groups = red.clusters(similarity, x.std(0), threshold=0.4)
    red.seed_dense_pairs(x, threshold=0.3)
    assert time.perf_counter() - start < 20  # 0.6 s on an idle machine
    assert pairs.removed.size > 100 and groups.removed.size > 0

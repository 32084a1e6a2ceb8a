"""Seconds of importance-then-redundancy, against loops as the script has them.

    python benchmarks/redundancy_speed.py --channels=512 --images=10000 --json=out.json

The loops: a histogram a channel; a Python call a pair for its correlation; for every
pair that the cap allows a scan of all pairs with membership tests in lists. The cap of
0.9 is what the script has reached at the eleventh of VGG-16's convolutions.
jaxprune streams the same activations in batches of 250 through the jitted updates
that the method runs, then pairs by one sort. Synthetic activations of seed 0, some
channels dead, many correlated. jaxprune's time is the least of five. Both must find the same: entropies to 1e-6,
correlations to 1e-4, the pairs exactly; nothing is printed otherwise.
`--dense=4096` times the rule for Dense layers, without the loops.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxprune.criteria import redundancy as numbers
from jaxprune.stats import activations as stats
from jaxprune.summary import commit

BATCH = 250


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def activations(images: int, channels: int) -> np.ndarray:
    """float32 (images, channels), pooled and rectified; one in 16 is dead.

    Correlated as in the last layers of a trained VGG-16 on CIFAR-10, where the median
    channel has a twin at 0.85.
    """
    rng = np.random.default_rng(0)
    features = rng.normal(size=(images, 8))
    x = features @ rng.normal(size=(8, channels))
    x = np.maximum(x + 0.25 * rng.normal(size=x.shape), 0)
    x[:, ::16] = 0
    return x.astype(np.float32)


# The loops -----------------------------------------------------------------------


def loop_entropies(x: np.ndarray) -> np.ndarray:
    """(C,): numpy's histogram edges, digitize and bincount + 1, channel by channel."""
    found = []
    for channel in range(x.shape[1]):
        _, edges = np.histogram(x[:, channel], bins=10)
        p = (np.bincount(np.digitize(x[:, channel], edges)) + 1) / len(x)
        found.append(float(np.sum(-np.log(p) * p)))
    return np.asarray(found)


def loop_correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(axis=0), b - b.mean(axis=0)
    squares = np.outer((a * a).sum(axis=0), (b * b).sum(axis=0))
    return np.clip(np.matmul(a.transpose(), b) / np.sqrt(squares), -1.0, 1.0)[0, 0]


def loop_correlations(x: np.ndarray, gone: list[int]) -> np.ndarray:
    """(C, C), upper triangle: |Pearson correlation|, one call a pair."""
    size = x.shape[1]
    table = np.zeros((size, size))
    for i in range(size):
        for j in range(i + 1, size):
            if i not in gone and j not in gone:
                table[i, j] = abs(loop_correlation(x[:, i], x[:, j]))
    return table


def loop_pairs(
    table: np.ndarray, gone: list[int], threshold: float, most: int
) -> list[int]:
    """The lower indices of the pairs, each found by a scan of the whole table.

    As the script does, it scans `most` times, whether or not a pair is left.
    """
    size = len(table)
    retired, removed = list(gone), []
    for _ in range(most):
        best, pair = threshold, None
        for i in range(size):
            if i in gone:
                continue
            for j in range(i + 1, size):
                if j in gone or table[i, j] <= best:
                    continue
                if i not in retired and j not in retired:
                    best, pair = table[i, j], (i, j)
        if pair is not None:
            retired += pair
            removed.append(pair[0])
    return removed


# The library ----------------------------------------------------------------------


def stream(x: np.ndarray, state: Any, update: Callable[..., Any]) -> Any:
    for start in range(0, len(x), BATCH):
        state = update(state, x[start : start + BATCH])
    return jax.block_until_ready(state)


def first_pass(states, x):
    ranges, moments = states
    return stats.stats_update(ranges, x), stats.comoments_update(moments, x)


def library(x: np.ndarray, updates, entropy_threshold: float, threshold: float, cap):
    """(entropies, |correlations|, removed) as the method computes them."""
    size = x.shape[1]
    zeros = stats.stats_zeros(size), stats.comoments_zeros(size)
    ranges, moments = stream(x, zeros, updates[0])
    edges = numbers.range_edges(np.asarray(ranges.min), np.asarray(ranges.max))
    histogram = stream(x, stats.histogram_zeros(edges), updates[1])
    entropies = numbers.seed_entropies_from_counts(
        stats.histogram_counts(histogram), len(x)
    )
    similarity = stats.pearson(moments)
    dull = np.flatnonzero(entropies < entropy_threshold)
    twins = numbers.seed_pairs(similarity, threshold=threshold, cap=cap, exclude=dull)
    return entropies, np.abs(similarity), twins.removed


def compare(channels: int, images: int, threshold: float, cap: float) -> dict[str, Any]:
    """Seconds of both on one layer.

    Raises:
      AssertionError: they do not find the same.
    """
    x = activations(images, channels)
    updates = jax.jit(first_pass), jax.jit(stats.histogram_update)
    cold, _ = seconds(lambda: library(x, updates, 0.3, threshold, cap))
    # The least of five: other programs disturb so short a time.
    runs = [seconds(lambda: library(x, updates, 0.3, threshold, cap)) for _ in range(5)]
    warm, mine = min(runs, key=lambda run: run[0])
    x = x.astype(np.float64)
    times = {}
    times["entropies"], entropies = seconds(lambda: loop_entropies(x))
    gone = np.flatnonzero(entropies < 0.3).tolist()
    times["correlations"], table = seconds(lambda: loop_correlations(x, gone))
    most = math.floor((channels - len(gone)) * cap)
    times["pairs"], removed = seconds(lambda: loop_pairs(table, gone, threshold, most))
    np.testing.assert_allclose(mine[0], entropies, atol=1e-6)
    free = np.ix_(*[np.setdiff1d(np.arange(channels), gone)] * 2)
    np.testing.assert_allclose(np.triu(mine[1], 1)[free], table[free], atol=1e-4)
    assert mine[2].tolist() == removed, "the pairs differ"
    loops = sum(times.values())
    return {
        "channels": channels,
        "images": images,
        "dull": len(gone),
        "pairs": len(removed),
        "loops": {name: round(t, 2) for name, t in times.items()},
        "loops_seconds": round(loops, 2),
        "jaxprune_seconds": round(warm, 4),
        "jaxprune_seconds_with_compilation": round(cold, 3),
        "ratio": round(loops / warm),
        "ratio_with_compilation": round(loops / cold),
    }


def dense(units: int, images: int, threshold: float) -> dict[str, Any]:
    """Seconds of both rules on a Dense layer: the script's, and the default's clusters."""
    x = activations(images, units)
    updates = jax.jit(first_pass), jax.jit(stats.histogram_update)

    def seed():
        ranges = stream(x, stats.stats_zeros(units), jax.jit(stats.stats_update))
        edges = numbers.range_edges(np.asarray(ranges.min), np.asarray(ranges.max))
        stream(x, stats.histogram_zeros(edges), updates[1])
        return numbers.seed_dense_pairs(x, threshold=threshold)

    def default():
        zeros = stats.stats_zeros(units), stats.comoments_zeros(units)
        ranges, moments = stream(x, zeros, updates[0])
        edges = numbers.shared_edges(ranges.mean, ranges.variance)
        histogram = stream(x, stats.histogram_zeros(edges), updates[1])
        entropies = numbers.entropies_from_counts(stats.histogram_counts(histogram))
        return numbers.clusters(stats.pearson(moments), entropies, threshold=threshold)

    return {
        "units": units,
        "images": images,
        "seed_seconds": round(seconds(seed)[0], 2),
        "default_seconds": round(seconds(default)[0], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--channels", type=int, default=512)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--cap", type=float, default=0.9)
    parser.add_argument("--dense", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    result = {
        "commit": commit(),
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()})",
        "dense": dense(args.dense, args.images, args.threshold),
    }
    print(json.dumps(result, indent=1), flush=True)
    result["layer"] = compare(args.channels, args.images, args.threshold, args.cap)
    print(json.dumps(result["layer"], indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

"""Seconds of selection, refit and redundancy at the sizes of a full-width VGG-16.

    python benchmarks/solver_speed.py [--large]

Synthetic statistics, seed 0: correlated Gaussian inputs of 512 channels under a 3x3
kernel (R = 4,608 rows, N = 512 outputs). Also the largest difference from scikit-learn
at the same lambda. `--large` adds exact counts among 4,096 channels (a Dense layer's,
512 outputs), by LASSO and by elimination. He et al.'s procedure on the layers of a
trained network is in he_procedure.py.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from sklearn.linear_model import Lasso

from jaxprune.criteria.redundancy import pearson_matrix, seed_entropies, seed_pairs
from jaxprune.solver.elimination import elimination_order
from jaxprune.solver.gram import gate_system
from jaxprune.solver.lasso import lasso, select_exact
from jaxprune.solver.refit import refit
from jaxprune.stats import moments as moments_lib


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = run()
    return round(time.perf_counter() - start, 3), result


def system(channels: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """A positive semidefinite Gram matrix and a linear term, with correlations."""
    mixing = rng.normal(size=(channels, channels // 2)) / np.sqrt(channels)
    gram = mixing @ mixing.T + 0.05 * np.eye(channels)
    return gram, gram @ rng.uniform(0, 2, channels)


def sklearn_difference(rng: np.random.Generator) -> float:
    """max |b - b_sklearn| over lambdas and both signs, 64 channels, 400 samples."""
    x = rng.normal(size=(400, 64)) @ rng.normal(size=(64, 64)) / 8
    y = x @ rng.uniform(-1, 1, 64) + 0.1 * rng.normal(size=400)
    worst = 0.0
    for lam in (1.0, 0.1, 0.01):
        for positive in (True, False):
            model = Lasso(
                alpha=lam, fit_intercept=False, positive=positive, tol=1e-12,
                max_iter=1_000_000,
            )  # fmt: skip
            expected = model.fit(x, y).coef_
            found = lasso(x.T @ x / 400, x.T @ y / 400, lam, nonnegative=positive)
            worst = max(worst, float(np.abs(found - expected).max()))
    return worst


def dense_elimination(rng: np.random.Generator, channels: int, keep: int) -> float:
    """Seconds of the exact count among the inputs of one Dense layer."""
    mixing = rng.normal(size=(channels // 2, channels)) / np.sqrt(channels)
    x = rng.normal(size=(2 * channels, channels // 2)) @ mixing
    x = (x + 0.2 * rng.normal(size=x.shape)).astype(np.float32)
    kernel = rng.normal(size=(channels, 512)) / np.sqrt(channels)
    y = (x @ kernel).astype(np.float32)
    found = moments_lib.update(moments_lib.zeros(channels, 512), x, y)
    term = (found, kernel, np.arange(channels), None)
    return seconds(lambda: elimination_order([term], channels, keep))[0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", action="store_true")
    args = parser.parse_args()
    rng = np.random.default_rng(0)
    result: dict[str, Any] = {"sklearn_max_difference": sklearn_difference(rng)}
    result["select_512_keep_256"] = seconds(
        lambda: select_exact(*system(512, rng), 256)
    )[0]
    if args.large:
        given = system(4096, rng)
        result["select_4096_keep_2048"] = seconds(lambda: select_exact(*given, 2048))[0]

        result["eliminate_4096_keep_2048"] = dense_elimination(rng, 4096, 2048)

    x = rng.normal(size=(6000, 4608)).astype(np.float32)
    x += 2 * rng.normal(size=(6000, 1)).astype(np.float32)
    kernel = rng.normal(size=(4608, 512)) / 68
    y = (x @ kernel).astype(np.float32)
    empty = moments_lib.zeros(4608, 512)
    result["moments_6000_rows"], moments = seconds(
        lambda: jax.block_until_ready(moments_lib.update(empty, x, y))
    )
    channel = np.arange(4608) % 512
    result["gate_gram"] = seconds(
        lambda: gate_system(moments, kernel, channel, channels=512)
    )[0]
    result["eliminate_512_keep_256"] = seconds(
        lambda: elimination_order([(moments, kernel, channel, None)], 512, 256)
    )[0]
    half = channel < 256
    result["refit_half"] = seconds(lambda: refit(moments, half, kernel=kernel))[0]

    maps = np.maximum(rng.normal(size=(10_000, 512)) + rng.normal(size=512), 0)
    result["entropies_512"] = seconds(lambda: seed_entropies(maps))[0]
    result["pearson_512"], similarity = seconds(lambda: pearson_matrix(maps))
    result["pairs_512"] = seconds(
        lambda: seed_pairs(similarity, threshold=0.01, cap=0.5)
    )[0]
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

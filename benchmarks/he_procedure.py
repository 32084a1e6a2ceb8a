"""Seconds of He et al.'s selection and refit, and of jaxprune's, on a VGG's layers.

    python benchmarks/he_procedure.py --model=cifar_vgg16_bn --width=0.5 \
        --init_from=vgg16_half_cifar10.npz --data=npz:DIR --json=out.json

He, Zhang, Sun, ICCV 2017, arXiv:1707.06168, as their code runs it: scikit-learn's Lasso
on 400 patches, its alpha bisected until the count is within 10 % above the one asked,
then scikit-learn's LinearRegression on all patches of the kept channels. jaxprune: the
moments of all patches, the exact count along the lambda path, and the ridge refit; the
moments' program is compiled for every layer's shape ("compile", counted in "ratio" and
left out of "ratio_compiled"). Both get the same patches X and outputs Y of the original network, 10
positions an image, and keep half the channels; making X and Y is not timed. "error" is
what is left of Y's variance on those patches.
"""

from __future__ import annotations

import json
import platform
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cifar_pruning import base_network, make_parser
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import Lasso, LinearRegression

import jaxprune as jp
from jaxprune import trees
from jaxprune.data import batches, load
from jaxprune.graph import evaluate, tree_arguments
from jaxprune.methods.taps import Tap, find_taps, output_map, rows_and_targets
from jaxprune.solver.cpli import group_system, select_gates
from jaxprune.solver.refit import refit
from jaxprune.stats import example_positions
from jaxprune.stats import moments as moments_lib
from jaxprune.summary import commit

POSITIONS = 10
SUBSAMPLE = 400  # patches that the Lasso sees, `lib/decompose.py`
FIRST_ALPHA = 1e-3
TOLERANCE = 0.1  # of the count
MOST_FITS = 60  # theirs has no limit

Kernel = np.ndarray
Rows = tuple[np.ndarray, np.ndarray]


def he_select(
    x: np.ndarray, y: np.ndarray, kernel: Kernel, channel: np.ndarray, keep: int
) -> tuple[np.ndarray, int]:
    """(kept channels, Lasso fits): `keep` to 10 % more of them.

    Args:
      x, y: patches (n, R) and outputs (n, N).
      kernel: (R, N).
      channel: int (R,), the channel of each row.
    """
    rng, channels = np.random.default_rng(0), int(channel.max()) + 1
    chosen = rng.integers(len(x), size=min(SUBSAMPLE, len(x) // 20))
    parts = [
        (x[chosen][:, channel == c] @ kernel[channel == c]).reshape(-1)
        for c in range(channels)
    ]
    z, target = np.stack(parts, 1), y[chosen].reshape(-1)
    lasso = Lasso(warm_start=True, selection="random", random_state=0)
    fits = 0

    def kept(alpha: float) -> np.ndarray:
        nonlocal fits
        fits += 1
        lasso.alpha = alpha
        return np.flatnonzero(lasso.fit(z, target).coef_)

    left, right = 0.0, FIRST_ALPHA
    while kept(right).size >= keep and fits < MOST_FITS:
        right *= 2
    while True:
        alpha = (left + right) / 2
        found = kept(alpha)
        if found.size > (1 + TOLERANCE) * keep:
            left = alpha
        elif found.size < keep:
            right = alpha
        else:
            return found, fits
        if fits >= MOST_FITS:
            return found, fits


def he_layer(
    x: np.ndarray, y: np.ndarray, kernel: Kernel, channel: np.ndarray, keep: int
) -> dict[str, Any]:
    """Selection and refit of one layer by He et al.'s procedure."""
    start = time.perf_counter()
    kept, fits = he_select(x, y, kernel, channel, keep)
    chosen = time.perf_counter()
    rows = np.isin(channel, kept)
    model = LinearRegression().fit(x[:, rows], y)
    done = time.perf_counter()
    return {
        "kept": int(kept.size),
        "fits": fits,
        "select": chosen - start,
        "refit": done - chosen,
        "error": error(y, model.predict(x[:, rows])),
    }


def our_layer(
    x: np.ndarray,
    y: np.ndarray,
    kernel: Kernel,
    channel: np.ndarray,
    keep: int,
    *,
    size: int,
) -> dict[str, Any]:
    """The same by moments, an exact count and the ridge refit.

    size: patches of a batch of images; a small map has fewer than `POSITIONS` each.
    """
    moments = moments_lib.zeros(*kernel.shape)
    start = time.perf_counter()
    batch = jnp.asarray(x[:size]), jnp.asarray(y[:size])
    update = _update.lower(moments, *batch).compile()
    compiled = time.perf_counter()
    for first in range(0, len(x), size):  # a batch of images at a time
        part = slice(first, first + size)
        moments = update(moments, jnp.asarray(x[part]), jnp.asarray(y[part]))
    jax.block_until_ready(moments)
    measured = time.perf_counter()
    channels = int(channel.max()) + 1
    system = group_system([(moments, kernel, channel, None)], channels)
    kept = select_gates(
        system, np.zeros(channels), keep, mu=0.0, nonnegative=False
    ).kept
    chosen = time.perf_counter()
    solved = refit(moments, np.isin(channel, kept), kernel=kernel)
    done = time.perf_counter()
    return {
        "kept": int(kept.size),
        "compile": compiled - start,
        "moments": measured - compiled,
        "select": chosen - measured,
        "refit": done - chosen,
        "error": error(y, x @ solved.kernel + solved.intercept),
    }


_update = jax.jit(moments_lib.update, donate_argnums=0)


def error(y: np.ndarray, found: np.ndarray) -> float:
    """Mean squared error over the variance of Y."""
    return float(np.square(y - found).mean() / y.var(0).mean())


def collect(
    graph: Any, taps: Sequence[Tap], variables: Any, data: Sequence[Any]
) -> dict[str, Rows]:
    """{kernel path: (X (n, R), Y (n, N))} of the original network."""
    at = {tap.site: tap for tap in taps}

    @jax.jit
    def run(variables, x, key):
        found, keys = {}, jax.random.split(key, len(x))

        def after(site, eqn, operands, results):
            if site in at:
                tap = at[site]
                chosen = example_positions(keys, output_map(tap, eqn), POSITIONS)
                x, y = rows_and_targets(
                    tap, eqn, operands[tap.image], results[0], chosen
                )
                found[tap.path] = x.reshape(-1, tap.rows), y.reshape(-1, tap.outputs)
            return results

        evaluate(graph.closed, tree_arguments(variables, (x,)), after=after)
        return found

    parts: dict[str, list[Rows]] = {tap.path: [] for tap in taps}
    for number, (x, _) in enumerate(data):
        found = run(variables, x, jax.random.key(number))
        for path, rows in found.items():
            parts[path].append((np.asarray(rows[0]), np.asarray(rows[1])))
    return {
        path: (np.concatenate([x for x, _ in p]), np.concatenate([y for _, y in p]))
        for path, p in parts.items()
    }


def compare(
    say: Callable[[str], None],
    base: tuple[Any, Any],
    data: Sequence[Any],
) -> dict[str, Any]:
    """Rows of all layers and the totals, JSON-ready."""
    graph = jp.trace(*base, data[0][0])
    taps = [tap for tap in find_taps(graph) if "conv" in tap.path]
    leaves = trees.flatten(base[1])
    rows = collect(graph, taps, base[1], data)
    result: dict[str, Any] = {
        "patches": len(next(iter(rows.values()))[0]),
        "layers": [],
    }
    for group in graph.groups:
        for tap in taps:
            channel = tap.row_channels(group)
            if (channel < 0).any():
                continue
            x, y = rows.pop(tap.path)
            given = x, y, tap.matrix(leaves[tap.path]), channel, group.size // 2
            ours = our_layer(*given, size=len(x) // len(data))
            he = he_layer(*given)
            result["layers"].append({"layer": tap.path, "jaxprune": ours, "he": he})
            say(json.dumps(result["layers"][-1]))
    for name in ("jaxprune", "he"):
        result[f"{name}_seconds"] = sum(
            layer[name].get(part, 0.0)
            for layer in result["layers"]
            for part in ("compile", "moments", "select", "refit")
        )
    compiling = sum(layer["jaxprune"]["compile"] for layer in result["layers"])
    result["compile_seconds"] = compiling
    result["ratio"] = result["he_seconds"] / result["jaxprune_seconds"]
    result["ratio_compiled"] = result["he_seconds"] / (
        result["jaxprune_seconds"] - compiling
    )
    return result


def main() -> None:
    parser = make_parser(__doc__)
    args = parser.parse_args()
    warnings.simplefilter("ignore", ConvergenceWarning)
    dataset = load(args.data, data_dir=args.data_dir, validation=0.02, seed=args.seed)
    if args.examples % 250:
        parser.error("--examples must be a multiple of 250, the batch")
    examples = dataset.train.take(args.examples, seed=args.seed)
    base = base_network(args, dataset)
    found = compare(
        lambda text: print(text, flush=True), base, list(batches(examples, 250))
    )
    result = {
        "commit": commit(),
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()})",
        "seed": args.seed,
        **found,
    }
    print(json.dumps({k: v for k, v in result.items() if k != "layers"}, indent=1))
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()

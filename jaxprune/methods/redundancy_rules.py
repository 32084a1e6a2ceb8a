"""What importance-then-redundancy sees of a group, and what it decides by that.

Pure functions from statistics to kept channels; `importance_redundancy` runs them over
a network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.checks import FLAG, NAME, check_values, number, one_of, optional
from jaxprune.criteria import redundancy as numbers
from jaxprune.criteria.redundancy import Redundancy
from jaxprune.errors import ConfigError
from jaxprune.methods.reconstruct import (
    Observe,
)
from jaxprune.methods.refitting import (
    Choice,
)
from jaxprune.stats import activations as stats_lib
from jaxprune.stats.activations import ActivationStats, Comoments

Bins = Literal["shared", "range"]
Pairing = Literal["clusters", "pairs"]
Preset = Literal["seed"]
EXEMPT = 3  # convolutions before the first that the script searches for pairs


@dataclass(frozen=True)
class Rules:
    """What is important, and which channels are twins.

    Attributes:
      preset: "seed" for the script's own numbers; thresholds only, no other option.
      entropy_threshold: channels below this entropy (nats, 10 bins) go.
      similarity_threshold: |Pearson correlation| above which channels are twins.
      importance: "entropy" or a criterion (`jaxprune.criteria.CRITERIA`), taken once
        before anything is pruned: the more important twin survives, and a budget
        takes the least important channels first.
      bins: of the entropy: "shared", of one width for the whole layer, or "range", on
        each channel's own range, which cannot see a channel that hardly varies.
      pairing: "clusters", in which one channel stands for all others, or "pairs".
      spatial: correlate over space as well, not over pooled means alone.
      fold: move a removed twin's weights to its survivor's.

    Raises:
      ConfigError: a value of a wrong type or out of range, or the preset with options
        of the default.
    """

    preset: Preset | None = None
    entropy_threshold: float = 0.3
    similarity_threshold: float = 0.8
    importance: str = "entropy"
    bins: Bins = "shared"
    pairing: Pairing = "clusters"
    spatial: bool = True
    fold: bool = True

    def __post_init__(self):
        rules = {
            "preset": optional(one_of(*get_args(Preset))),
            "entropy_threshold": number(),
            "similarity_threshold": number(),
            "importance": NAME,
            "bins": one_of(*get_args(Bins)),
            "pairing": one_of(*get_args(Pairing)),
            "spatial": FLAG,
            "fold": FLAG,
        }
        check_values(vars(self), rules)
        fixed = ("importance", "bins", "pairing", "spatial", "fold")
        own = [n for n in fixed if getattr(self, n) != getattr(Rules, n)]
        if self.preset == "seed" and own:
            raise ConfigError(
                f"preset='seed' fixes {', '.join(own)}: leave out the preset to choose"
            )


class Seen(NamedTuple):
    """Statistics of a group's activations.

    Attributes:
      pooled: of the means over space, one sample an example.
      counts: int64 (C, K + 2), `stats.histogram_counts` of the pooled means.
      moments: from which correlations and folding lines follow.
    """

    pooled: ActivationStats
    counts: np.ndarray
    moments: Comoments


def _pool(x: jax.Array) -> jax.Array:
    """Activations (B, *spatial, copies, C) averaged to (B, C)."""
    return x.mean(tuple(range(1, x.ndim - 1)))


def measure(
    run: Callable[..., dict[str, Any]],
    sizes: Mapping[str, int],
    *,
    spatial: bool,
    shared: bool,
    limit: int | None,
) -> dict[str, Seen]:
    """Two passes: ranges and co-moments, then histograms on bins over the ranges.

    Args:
      run: ({group: state}, update, limit=examples) -> {group: state}, one pass.
      sizes: channels of each group.
      spatial: correlate over space as well, not over pooled means alone.
      shared: bins of one width for each group's channels, not each channel's range.
    """

    def first(states, x):
        stats, moments = states
        mean = _pool(x)
        return (
            stats_lib.stats_update(stats, mean),
            stats_lib.comoments_update(moments, x if spatial else mean),
        )

    def edges(pooled: ActivationStats) -> np.ndarray:
        if shared:
            return numbers.shared_edges(pooled.mean, pooled.variance)
        return numbers.range_edges(pooled.min, pooled.max)

    zeros = {
        name: (stats_lib.stats_zeros(size), stats_lib.comoments_zeros(size))
        for name, size in sizes.items()
    }
    found = run(zeros, first, limit=limit)
    histograms = run(
        {
            name: stats_lib.histogram_zeros(edges(pooled))
            for name, (pooled, _) in found.items()
        },
        lambda state, x: stats_lib.histogram_update(state, _pool(x)),
        limit=limit,
    )
    return {
        name: Seen(pooled, stats_lib.histogram_counts(histograms[name]), moments)
        for name, (pooled, moments) in found.items()
    }


def first_rows(observe: Observe, size: int, limit: int) -> np.ndarray:
    """Pooled activations (n, C) of the first examples, at most `limit`."""

    def add(state, x):
        rows, count = state
        new = _pool(x).astype(rows.dtype)
        return lax.dynamic_update_slice(rows, new, (count, 0)), count + len(new)

    empty = jnp.zeros((limit, size), jnp.float32), jnp.int32(0)
    rows, count = observe(empty, add, limit=limit)
    return np.asarray(rows)[: int(count)]


def seed_choice(
    seen: Seen, rows: np.ndarray | None, order: int | None, rules: Rules
) -> np.ndarray:
    """Kept indices by the script's rules; one channel always stays.

    Args:
      rows: (n, C) activations of a Dense layer's first examples, None for others.
      order: place among the convolutions of the network.
    """
    entropies = numbers.seed_entropies_from_counts(seen.counts, int(seen.pooled.count))
    dull = np.flatnonzero(entropies < rules.entropy_threshold)
    if rows is None:
        cap = 0.0
        if order is not None and order >= EXEMPT:
            cap = numbers.seed_cap(order - EXEMPT)
        twins = numbers.seed_pairs(
            stats_lib.pearson(seen.moments),
            threshold=rules.similarity_threshold, cap=cap, exclude=dull,
        )  # fmt: skip
    else:
        twins = numbers.seed_dense_pairs(
            rows, threshold=rules.similarity_threshold, exclude=dull
        )
    mask = np.ones(entropies.size, bool)
    mask[dull] = mask[twins.removed] = False
    if not mask.any():
        mask[np.argmax(entropies)] = True
    return np.flatnonzero(mask)


def default_choice(
    seen: Seen, importance: np.ndarray | None, keep: int | None, rules: Rules
) -> Choice:
    """Dull channels go, then twins, then, down to `keep`, the least important.

    Args:
      importance: (C,), larger survives; None for the entropy.
      keep: channels that stay; None to follow the thresholds alone.
    """
    entropies = numbers.entropies_from_counts(seen.counts)
    size = entropies.size
    ranks = entropies if importance is None else np.asarray(importance, np.float64)
    least = 1 if keep is None else keep
    # Ascending importance; a channel that varies more counts among equals.
    ranked = np.lexsort((np.arange(size), np.asarray(seen.pooled.variance), ranks))
    dull = [c for c in ranked if entropies[c] < rules.entropy_threshold]
    dull = np.asarray(dull[: size - least], np.int64)
    find = numbers.clusters if rules.pairing == "clusters" else numbers.pairs
    twins = find(
        stats_lib.pearson(seen.moments),
        ranks,
        threshold=rules.similarity_threshold,
        most=size - least - dull.size,
        exclude=dull,
    )
    mask = np.ones(size, bool)
    mask[dull] = mask[twins.removed] = False
    if keep is not None:
        # Those that stand for others go last.
        stands = np.isin(ranked, twins.survivor)
        spare = np.concatenate([ranked[~stands], ranked[stands]])
        mask[spare[mask[spare]][: int(mask.sum()) - keep]] = False
    twins = Redundancy(*(part[mask[twins.survivor]] for part in twins))
    kept = np.flatnonzero(mask)
    if not rules.fold or not twins.removed.size:
        return Choice(kept)
    count = max(float(seen.moments.count), 1.0)
    lines = numbers.fold_coefficients(
        np.asarray(seen.moments.mean), np.asarray(seen.moments.outer) / count, twins
    )
    return Choice(kept, twins, lines)

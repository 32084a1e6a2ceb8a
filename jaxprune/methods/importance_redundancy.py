"""Importance, then redundancy: low-entropy channels go, then those with a twin.

Seed 004, the script "pruning based on importance and redundancy" for a Keras VGG-16.
`preset="seed"` takes its numbers: entropy on each channel's own range, the lower
index of a correlated pair dies, at most a growing share of a convolution, the first
three convolutions exempt from the second step, no compensation. The default repairs
what it gets wrong: bins of one width for the whole layer, correlation over space,
clusters in which the most important channel survives, weights folded into the
survivor, least-squares refit, and a budget where one is asked. Each repair is an
option of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxprune.criteria import redundancy as numbers
from jaxprune.criteria.redundancy import Redundancy
from jaxprune.errors import ConfigError
from jaxprune.graph import ChannelGraph
from jaxprune.methods.activations import find_places
from jaxprune.methods.measure import Calibration, LossFn
from jaxprune.methods.reconstruct import (
    Choice,
    Observe,
    Progress,
    Reconstruction,
    Refit,
    Term,
    reconstruct,
)
from jaxprune.methods.scores import score
from jaxprune.methods.taps import find_taps
from jaxprune.records import Group
from jaxprune.stats import activations as stats_lib
from jaxprune.stats.activations import ActivationStats, Comoments

Preset = Literal["seed"]
Bins = Literal["shared", "range"]
Pairing = Literal["clusters", "pairs"]
EXEMPT = 3  # convolutions before the first that the script searches for pairs
EXAMPLES = 10_000


class Rules(NamedTuple):
    """Options of the default; see `importance_redundancy`."""

    entropy_threshold: float
    similarity_threshold: float
    bins: Bins = "shared"
    pairing: Pairing = "clusters"
    spatial: bool = True
    fold: bool = True


def importance_redundancy(
    graph: ChannelGraph,
    variables: Any,
    calibration: Calibration,
    counts: Mapping[str, int] | None,
    *,
    groups: Sequence[Group],
    fallback: Mapping[str, np.ndarray],
    order: Sequence[str],
    loss_fn: LossFn | None = None,
    preset: Preset | None = None,
    entropy_threshold: float = 0.3,
    similarity_threshold: float = 0.8,
    importance: str = "entropy",
    bins: Bins = "shared",
    pairing: Pairing = "clusters",
    spatial: bool = True,
    fold: bool = True,
    refit: Refit | None = None,
    positions: int | None = 10,
    ridge: float | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Reconstruction:
    """Prunes group after group, statistics taken in the network pruned so far.

    Args:
      graph: traced with inputs of the calibration's batch shape.
      counts: channels to keep, by group; None to follow the thresholds alone.
      fallback: scores (C,) for groups without activations of their own; used with
        counts only, without they are kept whole.
      order: names of all convolution groups of the whole network in order, from
        which the script's exemption and growing share follow.
      loss_fn: (outputs, y) -> per-example losses (B,), for an `importance` of
        gradients.
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
      refit: as for `reconstruct`; by default "lstsq", and "none" with the preset.

    Raises:
      ConfigError: the preset with counts or with options of the default, or an
        unknown value.
    """
    rules = Rules(entropy_threshold, similarity_threshold, bins, pairing, spatial, fold)
    _check(preset, rules, importance, counts is not None)
    taps = find_taps(graph)
    places = find_places(graph, groups, taps)
    eligible = {name: place for place, name in enumerate(order)}
    ranks: Mapping[str, np.ndarray] = {}
    if importance != "entropy":
        ranks = score(
            graph, variables, importance,
            batches=calibration, loss_fn=loss_fn, seed=seed,
        )  # fmt: skip

    def choose(group: Group, terms: Sequence[Term], observe: Observe | None) -> Choice:
        del terms
        if observe is None:
            if counts is None:
                return Choice(np.arange(group.size))
            ranked = np.argsort(
                -ranks.get(group.name, fallback[group.name]), kind="stable"
            )
            return Choice(np.sort(ranked[: counts[group.name]]))
        if preset == "seed":
            seen = _measure(
                observe, group.size, spatial=False, shared=False, limit=EXAMPLES
            )
            rows = None
            if not places[group.name].conv:
                rows = _first_rows(observe, group.size, numbers.SEED_DENSE_SAMPLES)
            return Choice(_seed_choice(seen, rows, eligible.get(group.name), rules))
        seen = _measure(
            observe, group.size, spatial=spatial, shared=bins == "shared", limit=None
        )
        keep = None if counts is None else counts[group.name]
        return _default_choice(seen, ranks.get(group.name), keep, rules)

    return reconstruct(
        graph,
        variables,
        calibration,
        taps,
        choose,
        groups=groups,
        places=places,
        refit=refit or ("none" if preset == "seed" else "lstsq"),
        positions=positions,
        ridge=ridge,
        seed=seed,
        on_progress=on_progress,
    )


def _check(preset: str | None, rules: Rules, importance: str, budget: bool) -> None:
    problems = []
    if preset not in (None, "seed"):
        problems.append(f"preset must be 'seed' or nothing; found {preset!r}")
    if rules.bins not in ("shared", "range"):
        problems.append(f"bins must be 'shared' or 'range'; found {rules.bins!r}")
    if rules.pairing not in ("clusters", "pairs"):
        problems.append(
            f"pairing must be 'clusters' or 'pairs'; found {rules.pairing!r}"
        )
    if preset == "seed":
        if budget:
            problems.append(
                "preset='seed' prunes by its two thresholds: leave out macs, params, "
                "bytes and keep"
            )
        plain = Rules(rules.entropy_threshold, rules.similarity_threshold)
        changed = [n for n in Rules._fields if getattr(rules, n) != getattr(plain, n)]
        changed += ["importance"] if importance != "entropy" else []
        if changed:
            problems.append(
                f"preset='seed' fixes {', '.join(changed)}: leave out the preset to "
                "choose"
            )
    if problems:
        raise ConfigError("; ".join(problems))


class _Seen(NamedTuple):
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


def _measure(
    observe: Observe, size: int, *, spatial: bool, shared: bool, limit: int | None
) -> _Seen:
    """Two passes: ranges and co-moments, then histograms on bins over the ranges."""

    def first(states, x):
        stats, moments = states
        mean = _pool(x)
        return (
            stats_lib.stats_update(stats, mean),
            stats_lib.comoments_update(moments, x if spatial else mean),
        )

    zeros = stats_lib.stats_zeros(size), stats_lib.comoments_zeros(size)
    pooled, moments = observe(zeros, first, limit=limit)
    ends = (pooled.mean, pooled.variance) if shared else (pooled.min, pooled.max)
    edges = (numbers.shared_edges if shared else numbers.range_edges)(*ends)
    histogram = observe(
        stats_lib.histogram_zeros(edges),
        lambda state, x: stats_lib.histogram_update(state, _pool(x)),
        limit=limit,
    )
    return _Seen(pooled, stats_lib.histogram_counts(histogram), moments)


def _first_rows(observe: Observe, size: int, limit: int) -> np.ndarray:
    """Pooled activations (n, C) of the first examples, at most `limit`."""

    def add(state, x):
        rows, count = state
        new = _pool(x).astype(rows.dtype)
        return lax.dynamic_update_slice(rows, new, (count, 0)), count + len(new)

    empty = jnp.zeros((limit, size), jnp.float32), jnp.int32(0)
    rows, count = observe(empty, add, limit=limit)
    return np.asarray(rows)[: int(count)]


def _seed_choice(
    seen: _Seen, rows: np.ndarray | None, order: int | None, rules: Rules
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


def _default_choice(
    seen: _Seen, importance: np.ndarray | None, keep: int | None, rules: Rules
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

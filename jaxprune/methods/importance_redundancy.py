"""Importance, then redundancy: low-entropy channels go, then those with a twin.

Seed 004, the script "pruning based on importance and redundancy" for a Keras VGG-16.
`preset="seed"` takes its numbers: entropy on each channel's own range, the lower
index of a correlated pair dies, at most a growing share of a convolution, the first
three convolutions exempt from the second step, no compensation. The default repairs
what it gets wrong: bins of one width for the whole layer, clusters in which the most
important channel survives, weights folded into the survivor, least-squares refit,
and a budget where one is asked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from jaxprune.criteria import redundancy as numbers
from jaxprune.criteria.redundancy import Redundancy
from jaxprune.errors import ConfigError
from jaxprune.graph import ChannelGraph
from jaxprune.methods.activations import Place, collect_pooled, find_places, stream
from jaxprune.methods.measure import Calibration
from jaxprune.methods.reconstruct import (
    Choice,
    Progress,
    Reconstruction,
    Refit,
    Term,
    reconstruct,
)
from jaxprune.methods.taps import find_taps
from jaxprune.records import Group
from jaxprune.stats import activations as stats_lib

Preset = Literal["seed"]
EXEMPT = 3  # convolutions before the first that the script searches for pairs
EXAMPLES = 10_000


def importance_redundancy(
    graph: ChannelGraph,
    variables: Any,
    calibration: Calibration,
    counts: Mapping[str, int] | None,
    *,
    groups: Sequence[Group],
    fallback: Mapping[str, np.ndarray],
    order: Sequence[str],
    preset: Preset | None = None,
    entropy_threshold: float = 0.3,
    similarity_threshold: float = 0.8,
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
      preset: "seed" for the script's own numbers; thresholds only.
      entropy_threshold: channels below this entropy (nats, 10 bins) go.
      similarity_threshold: |Pearson correlation| above which channels are twins.
      spatial: correlate over space as well, not over pooled means alone.
      fold: move a removed twin's weights to its survivor's.
      refit: as for `reconstruct`; by default "lstsq", and "none" with the preset.

    Raises:
      ConfigError: the preset with counts, or an unknown preset.
    """
    if preset not in (None, "seed"):
        raise ConfigError(f"preset must be 'seed' or nothing; found {preset!r}")
    if preset == "seed" and counts is not None:
        raise ConfigError(
            "preset='seed' prunes by its two thresholds: leave out macs, params, "
            "bytes and keep"
        )
    taps = find_taps(graph)
    places = find_places(graph, groups, taps)
    eligible = {name: place for place, name in enumerate(order)}

    def choose(group: Group, terms: Sequence[Term], current: Any) -> Choice:
        del terms
        place = places.get(group.name)
        if place is None:
            if counts is None:
                return Choice(np.arange(group.size))
            ranked = np.argsort(-fallback[group.name], kind="stable")
            return Choice(np.sort(ranked[: counts[group.name]]))
        if preset == "seed":
            kept = _seed_choice(
                graph, current, calibration, group, place, eligible.get(group.name),
                entropy_threshold, similarity_threshold,
            )  # fmt: skip
            return Choice(kept)
        return _default_choice(
            graph, current, calibration, group, place,
            None if counts is None else counts[group.name],
            entropy_threshold, similarity_threshold, spatial, fold,
        )  # fmt: skip

    return reconstruct(
        graph,
        variables,
        calibration,
        taps,
        choose,
        groups=groups,
        refit=refit or ("none" if preset == "seed" else "lstsq"),
        positions=positions,
        ridge=ridge,
        seed=seed,
        on_progress=on_progress,
    )


def _seed_choice(
    graph, current, calibration, group: Group, place: Place, order: int | None,
    entropy_threshold: float, similarity_threshold: float,
) -> np.ndarray:  # fmt: skip
    """Kept indices by the script's rules; one channel always stays."""
    only = {group.name: place}

    def run(state, update):
        found = stream(
            graph, current, calibration, only, {group.name: state}, update,
            pooled=True, limit=EXAMPLES,
        )  # fmt: skip
        return found[group.name]

    ranges = run(stats_lib.stats_zeros(group.size), stats_lib.stats_update)
    edges = numbers.range_edges(np.asarray(ranges.min), np.asarray(ranges.max))
    histogram = run(stats_lib.histogram_zeros(edges), stats_lib.histogram_update)
    counts = stats_lib.histogram_counts(histogram)
    entropies = numbers.seed_entropies_from_counts(counts, int(histogram.count))
    dull = np.flatnonzero(entropies < entropy_threshold)
    if place.conv:
        cap = 0.0
        if order is not None and order >= EXEMPT:
            cap = numbers.seed_cap(order - EXEMPT)
        moments = run(stats_lib.comoments_zeros(group.size), stats_lib.comoments_update)
        similarity = stats_lib.pearson(moments)
        twins = numbers.seed_pairs(
            similarity, threshold=similarity_threshold, cap=cap, exclude=dull
        )
    else:
        rows = collect_pooled(
            graph, current, calibration, place, limit=numbers.SEED_DENSE_SAMPLES
        )
        twins = numbers.seed_dense_pairs(
            rows, threshold=similarity_threshold, exclude=dull
        )
    mask = np.ones(group.size, bool)
    mask[dull] = mask[twins.removed] = False
    if not mask.any():
        mask[np.argmax(entropies)] = True
    return np.flatnonzero(mask)


def _default_choice(
    graph, current, calibration, group: Group, place: Place, keep: int | None,
    entropy_threshold: float, similarity_threshold: float, spatial: bool, fold: bool,
) -> Choice:  # fmt: skip
    only = {group.name: place}

    def run(state, update, pooled):
        found = stream(
            graph, current, calibration, only, {group.name: state}, update,
            pooled=pooled,
        )  # fmt: skip
        return found[group.name]

    stats = run(stats_lib.stats_zeros(group.size), stats_lib.stats_update, True)
    edges = numbers.shared_edges(np.asarray(stats.mean), np.asarray(stats.variance))
    histogram = run(stats_lib.histogram_zeros(edges), stats_lib.histogram_update, True)
    entropies = numbers.entropies_from_counts(stats_lib.histogram_counts(histogram))
    moments = run(
        stats_lib.comoments_zeros(group.size), stats_lib.comoments_update, not spatial
    )
    similarity = stats_lib.pearson(moments)
    size = group.size
    least = 1 if keep is None else keep
    # Ascending entropy; a channel that varies more counts among equals.
    ranked = np.lexsort((np.arange(size), np.asarray(stats.variance), entropies))
    dull = [c for c in ranked if entropies[c] < entropy_threshold][: size - least]
    twins = numbers.clusters(
        similarity,
        entropies,
        threshold=similarity_threshold,
        most=size - least - len(dull),
        exclude=np.asarray(dull, np.int64),
    )
    mask = np.ones(size, bool)
    mask[np.asarray(dull, np.int64)] = mask[twins.removed] = False
    if keep is not None:
        # Then whatever is least important among those that stand for no other.
        spare = [c for c in ranked if mask[c] and c not in set(twins.survivor)]
        spare += [c for c in ranked if mask[c] and c in set(twins.survivor)]
        mask[np.asarray(spare[: int(mask.sum()) - keep], np.int64)] = False
    twins = Redundancy(*(part[mask[twins.survivor]] for part in twins))
    kept = np.flatnonzero(mask)
    if not fold or not twins.removed.size:
        return Choice(kept)
    count = max(float(moments.count), 1.0)
    lines = numbers.fold_coefficients(
        np.asarray(moments.mean), np.asarray(moments.outer) / count, twins
    )
    return Choice(kept, twins, lines)

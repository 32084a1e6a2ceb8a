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
from dataclasses import replace
from typing import Any

import numpy as np

from jaxprune.criteria import redundancy as numbers
from jaxprune.graph import ChannelGraph
from jaxprune.methods.activations import find_places, stream
from jaxprune.methods.cpli import top
from jaxprune.methods.measure import Calibration, LossFn
from jaxprune.methods.reconstruct import (
    Chooser,
    Observe,
    Progress,
    Reconstruction,
    reconstruct,
)
from jaxprune.methods.redundancy_rules import (
    Rules,
    Seen,
    default_choice,
    first_rows,
    measure,
    seed_choice,
)
from jaxprune.methods.refitting import (
    Choice,
    Refitting,
    Term,
)
from jaxprune.methods.scores import score
from jaxprune.methods.taps import find_taps
from jaxprune.records import Group
from jaxprune.selection import Limits

EXAMPLES = 10_000


def importance_redundancy(
    graph: ChannelGraph,
    variables: Any,
    calibration: Calibration,
    counts: Mapping[str, int] | None,
    *,
    legal: Limits,
    groups: Sequence[Group],
    fallback: Mapping[str, np.ndarray],
    order: Sequence[str],
    loss_fn: LossFn | None = None,
    rules: Rules,
    refitting: Refitting,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Reconstruction:
    """Prunes group after group, statistics taken in the network pruned so far.

    Args:
      graph: traced with inputs of the calibration's batch shape.
      counts: channels to keep, by group; None to follow the thresholds alone, as the
        preset does.
      legal: counts that what the thresholds keep is rounded to.
      fallback: scores (C,) for groups without activations of their own; without counts
        those keep as many as is legal.
      order: names of all convolution groups of the whole network in order, from
        which the script's exemption and growing share follow.
      loss_fn: (outputs, y) -> per-example losses (B,), for an `importance` of
        gradients.
      rules: what is important, and which channels are twins.
      refitting: as for `reconstruct`; by default "none" with the preset.
    """
    script = rules.preset == "seed"
    if script and refitting.refit is None:
        refitting = replace(refitting, refit="none")
    shared = rules.bins == "shared"
    taps = find_taps(graph)
    places = find_places(graph, groups, taps)
    eligible = {name: place for place, name in enumerate(order)}
    ranks = _ranks(graph, variables, calibration, rules.importance, loss_fn, seed)

    def one(observe: Observe, group: Group, **options: Any) -> Seen:
        def run(states, update, limit):
            return {group.name: observe(states[group.name], update, limit=limit)}

        return measure(run, {group.name: group.size}, **options)[group.name]

    def choose(group: Group, terms: Sequence[Term], observe: Observe | None) -> Choice:
        del terms
        if observe is None:
            keep = group.size if counts is None else counts[group.name]
            if counts is None:
                keep = legal.legal(group.name, keep, group.size)
            return Choice(top(ranks.get(group.name, fallback[group.name]), keep))
        if script:
            seen = one(observe, group, spatial=False, shared=False, limit=EXAMPLES)
            rows = None
            if not places[group.name].conv:
                rows = first_rows(observe, group.size, numbers.SEED_DENSE_SAMPLES)
            return Choice(seed_choice(seen, rows, eligible.get(group.name), rules))
        seen = one(observe, group, spatial=rules.spatial, shared=shared, limit=None)
        rank = ranks.get(group.name)
        if counts is not None:
            return default_choice(seen, rank, counts[group.name], rules)
        choice = default_choice(seen, rank, None, rules)
        keep = legal.legal(group.name, choice.kept.size, group.size)
        if keep != choice.kept.size:
            choice = default_choice(seen, rank, keep, rules)
        return choice

    return reconstruct(
        graph,
        variables,
        calibration,
        taps,
        choose,
        groups=groups,
        places=places,
        refitting=refitting,
        seed=seed,
        on_progress=on_progress,
    )


def chooser(
    graph: ChannelGraph,
    variables: Any,
    calibration: Calibration,
    *,
    groups: Sequence[Group],
    fallback: Mapping[str, np.ndarray],
    loss_fn: LossFn | None = None,
    rules: Rules,
    seed: int = 0,
) -> Chooser:
    """The default's selection of any group at any count, in the network as it is.

    Measures all groups in two passes. Arguments are those of `importance_redundancy`.
    """
    ranks = _ranks(graph, variables, calibration, rules.importance, loss_fn, seed)
    places = find_places(graph, groups, find_taps(graph))

    def run(states, update, limit):
        return stream(
            graph, variables, calibration, places, states, update, limit=limit
        )

    sizes = {group.name: group.size for group in groups if group.name in places}
    shared = rules.bins == "shared"
    seen = measure(run, sizes, spatial=rules.spatial, shared=shared, limit=None)

    def choose(group: Group, terms: Sequence[Term], keep: int) -> np.ndarray:
        del terms
        rank = ranks.get(group.name)
        if group.name in seen:
            return default_choice(seen[group.name], rank, keep, rules).kept
        return top(fallback[group.name] if rank is None else rank, keep)

    return choose


def _ranks(
    graph: ChannelGraph,
    variables: Any,
    calibration: Calibration,
    importance: str,
    loss_fn: LossFn | None,
    seed: int,
) -> Mapping[str, np.ndarray]:
    """Scores by group; none for the entropy, which `default_choice` has itself."""
    if importance == "entropy":
        return {}
    return score(
        graph, variables, importance, batches=calibration, loss_fn=loss_fn, seed=seed
    )

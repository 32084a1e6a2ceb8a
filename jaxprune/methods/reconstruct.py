"""Group after group: choose channels, then refit the layers that read them.

The network keeps its full size throughout: removed channels are zero rows of their
consumers' kernels, so that every pass runs the same compiled program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from jaxprune import trees
from jaxprune.graph import ChannelGraph, Site
from jaxprune.graph.reductions import Reductions
from jaxprune.methods.activations import Place
from jaxprune.methods.measure import Calibration
from jaxprune.methods.refitting import (
    Choice,
    Refitting,
    Term,
    group_taps,
    measured_terms,
    refit_consumers,
    refitted,
)
from jaxprune.methods.relay import Relay
from jaxprune.methods.shortcuts import find_shortcuts
from jaxprune.methods.taps import Tap, by_kernel
from jaxprune.records import Group, Plan
from jaxprune.slicing import mask_variables
from jaxprune.stats.moments import Moments

# One pass over a group's activations: (state, update, limit=examples) -> state.
Observe = Callable[..., Any]
# (group, measured consumers, passes over its activations; None without a place) -> choice
Choose = Callable[[Group, Sequence[Term], Observe | None], Choice]
# (group, measured consumers, how many stay) -> kept indices
Chooser = Callable[[Group, Sequence[Term], int], np.ndarray]
Progress = Callable[[str, int, int], None]


class Reconstruction(NamedTuple):
    """Result of `reconstruct`.

    Attributes:
      plan: what was chosen.
      variables: full size, refitted; removed rows are zero.
      residuals: {tap's name: relative error left, mean over outputs}.
    """

    plan: Plan
    variables: Any
    residuals: dict[str, float]


def reconstruct(
    graph: ChannelGraph,
    variables: Any,
    calibration: Calibration,
    taps: Sequence[Tap],
    choose: Choose,
    *,
    groups: Sequence[Group],
    refitting: Refitting,
    places: Mapping[str, Place] | None = None,
    second: bool = True,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Reconstruction:
    """Chooses and refits group by group, in network order.

    Args:
      graph: traced with inputs of the calibration's batch shape.
      variables: the original arrays.
      taps: from `find_taps(graph)`.
      choose: picks a group's kept channels; called once a group.
      groups: those to prune; the others are kept whole.
      places: where the groups' activations are, for a `choose` that observes them.
      second: whether the terms that `choose` is given hold second moments; without,
        the refit can be "bias" or "none" only, and costs a fraction.
      seed: of the sampled positions.
    """
    sequential = refitting.passes == "sequential"
    current, original, residuals = variables, trees.flatten(variables), {}
    plan = graph.full_plan()
    keep: dict[str, np.ndarray] = {}
    measured: dict[str, Moments] = {}
    places = places or {}
    of_group = [group_taps(taps, group) for group in groups]
    turn = {tap.site: k for k, mine in enumerate(of_group) for tap in mine}
    relay = _relay(graph, variables, calibration, taps, turn, refitting)
    if not sequential:
        unique = {(tap.site, tap.part): tap for mine in of_group for tap in mine}
        measured = relay.moments(
            list(unique.values()), variables, seed=seed, second=second
        )
    for number, (group, mine) in enumerate(zip(groups, of_group, strict=True)):
        place = places.get(group.name)
        if sequential and (mine or place):
            ahead = [tap.site for later in of_group[number:] for tap in later]
            ahead += [places[g.name].site for g in groups[number:] if g.name in places]
            relay.advance(ahead, current, plan)
        if sequential:
            measured = relay.moments(
                mine, current, plan, seed=seed + number, second=second
            )
        leaves = trees.flatten(current)
        terms = measured_terms(group, mine, measured, leaves)
        observe = None
        if place is not None:
            observe = partial(relay.observe, place, current, plan=plan)
        choice = choose(group, terms, observe)
        keep[group.name] = np.sort(choice.kept)
        plan = graph.complete(keep)
        mask = graph.unit_mask(plan)
        changed = refit_consumers(
            terms, choice, leaves, original, mask, refitting, residuals
        )
        current = mask_variables(graph, plan, trees.replace(current, changed))
        if on_progress is not None:
            on_progress("prune", number + 1, len(groups))
    if sequential and refitting.refit_again and refitting.how != "none":
        current = _refit_again(
            graph, variables, calibration, taps, turn, plan, current, refitting,
            residuals, seed + len(groups), on_progress,
        )  # fmt: skip
    return Reconstruction(plan, current, residuals)


def _refit_again(
    graph: ChannelGraph,
    original: Any,
    calibration: Calibration,
    taps: Sequence[Tap],
    turn: Mapping[Site, int],
    plan: Plan,
    current: Any,
    refitting: Refitting,
    residuals: dict[str, float],
    seed: int,
    on_progress: Progress | None,
) -> Any:
    """The variables with consumers refitted once more, in order of execution.

    A group that is read all along the network (a residual stream) was pruned, and its
    consumers refitted, before the layers between them were; and a norm over a group's
    channels changes when they go, behind the measurement. From the first such consumer
    on all are measured anew; a chain of layers without such norms has none.
    """
    mask, leaves = graph.unit_mask(plan), trees.flatten(original)
    readers = [tap for tap in taps if not tap.row_keep(mask).all()]
    readers = _from_first_stale(readers, turn, Reductions(graph).first(plan))
    kernels = list(by_kernel(readers).items())
    turn = {t.site: k for k, (_, uses) in enumerate(kernels) for t in uses}
    relay = _relay(graph, original, calibration, taps, turn, refitting)
    for number, (name, uses) in enumerate(kernels):
        ahead = [tap.site for _, later in kernels[number:] for tap in later]
        relay.advance(ahead, current, plan)
        measured = relay.moments(uses, current, plan, seed=seed + number)
        now = trees.flatten(current)
        changed = refitted(
            uses[0], measured[name], uses[0].matrix(now[uses[0].path]), now, leaves,
            mask, refitting, residuals,
        )  # fmt: skip
        current = mask_variables(graph, plan, trees.replace(current, changed))
        if on_progress is not None:
            on_progress("refit", number + 1, len(kernels))
    return current


def _from_first_stale(
    taps: Sequence[Tap], turn: Mapping[Site, int], changed: Site | None
) -> Sequence[Tap]:
    """The taps, in order of execution, from the first that was refitted before one ahead
    of it, or that comes behind the first reduction that changed."""
    latest = -1
    for number, tap in enumerate(taps):
        if turn[tap.site] < latest or (changed is not None and tap.site > changed):
            return taps[number:]
        latest = max(latest, turn[tap.site])
    return ()


def _relay(
    graph: ChannelGraph,
    original: Any,
    calibration: Calibration,
    taps: Sequence[Tap],
    turn: Mapping[Site, int],
    refitting: Refitting,
) -> Relay:
    """A relay whose targets make up for other branches, if that is wanted."""
    sequential = refitting.passes == "sequential"
    shortcuts = {}
    if sequential and refitting.compensate and refitting.how == "lstsq":
        shortcuts = find_shortcuts(graph, taps, turn)
    return Relay(
        graph,
        original,
        calibration,
        positions=refitting.positions,
        shortcuts=shortcuts,
    )

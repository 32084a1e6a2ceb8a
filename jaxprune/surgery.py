"""The surgeon: slices every array by a plan and re-emits the smaller model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from jaxprune.check import (
    align,
    doubtful_divisors,
    means_of_the_source,
    slim_handle,
    slim_settings,
)
from jaxprune.collection import uncollected
from jaxprune.following import follow
from jaxprune.frameworks.replay import check_replay
from jaxprune.frameworks.replay import replay as replayed
from jaxprune.graph import ChannelGraph
from jaxprune.records import Plan, Slim
from jaxprune.rescale import Folded, rescale
from jaxprune.slicing import keep_indices, slice_variables


def shrink(
    graph: ChannelGraph,
    plan: Plan | Mapping[str, Any],
    variables: Any = None,
    *,
    replay: bool | None = None,
) -> Slim:
    """The smaller model: same architecture, sliced arrays of every collection.

    The static check (`jaxprune.check`) runs on the plan. Numbers that the user's modules
    state as attributes, heads and widths, are made to follow (`jaxprune.attributes`;
    `slim.report["settings"]`: path of the module, attribute, number). Groups that the
    model cannot follow, because its source writes a width into its code or states one
    number for several, are left whole; `slim.plan` is what was done, and
    `slim.report["left_whole"]` says why. Constants that follow a size, such
    as 1/sqrt(d) of attention, are made up for in the kernels (`jaxprune.rescale`;
    `slim.report["rescaled"]`), so that the slim model equals the masked original;
    groups whose constants nothing can make up for are left whole. The terms of a mean
    over channels (a layer normalisation's) are those that are left. Parameters that the
    traced call does not read (an auxiliary head of training, say) stay whole too, though
    what they would read may not: `slim.report["unread"]` names them, and a warning says
    so.

    Args:
      graph: from `trace`.
      plan: what is kept; groups it leaves out are kept whole.
      variables: arrays to slice (refitted ones, say); by default those traced.
      replay: for models whose source states widths: `slim.model` becomes a function
        (variables, *inputs) -> outputs that evaluates the original's program at the
        new sizes (`jaxprune.frameworks.replay`), so that those groups shrink too. By
        default as the graph was traced.

    A sum divided by the number of its terms is a mean, of the channels that are left.
    Where the division is in the model's own source, and may be by another number of
    that size (scores written out as `(q * k).sum(-1) / d`), it is listed in
    `slim.report["taken_for_means"]`, {source line: number}; a replay lists those of
    which the source at the smaller size could not tell.

    Raises:
      PlanError: the plan does not fit the graph.
      GraphError: the variables are not those that were traced.
    """
    slim = shrunk(graph, plan, variables, replay=replay)
    warn_unread(graph, slim.plan, stacklevel=3)
    return slim


@uncollected()
def shrunk(
    graph: ChannelGraph,
    plan: Plan | Mapping[str, Any],
    variables: Any = None,
    *,
    replay: bool | None = None,
) -> Slim:
    """`shrink` without its warning."""
    replay = graph.replay if replay is None else replay
    plan, left = follow(graph, graph.complete(plan), check_replay if replay else None)
    source = graph.variables if variables is None else variables
    small = slice_variables(graph, plan, source)
    folded, means = Folded(), frozenset()
    if replay:
        own, means = doubtful_divisors(graph, plan)
        model, settings = replayed(graph, plan, own=own), ()
    else:
        aligned = align(graph, plan)
        folded, means = aligned.folded, means_of_the_source(graph, aligned)
        small = rescale(keep_indices(graph, plan), folded, small)
        settings = slim_settings(graph, plan, aligned.numbers)
        model = slim_handle(graph, plan, small, aligned.numbers).model
    groups = [
        {"name": g.name, "size": g.size, "kept": len(plan[g.name])}
        for g in graph.groups
    ]
    report = {
        "groups": groups,
        "settings": settings,
        "left_whole": left,
        "unread": list(graph.unread),
        "taken_for_means": dict(sorted(means)),
        "rescaled": folded.by_path,
    }
    return Slim(model, small, plan, report)


def warn_unread(graph: ChannelGraph, plan: Plan, *, stacklevel: int) -> None:
    """Warns of parameters that the call does not read, if anything was pruned.

    Args:
      stacklevel: of `warnings.warn`; 2 is the caller's line.
    """
    paths, most = graph.unread, 3
    if not paths or all(len(plan[g.name]) == g.size for g in graph.groups):
        return
    more = f" and {len(paths) - most} more" if len(paths) > most else ""
    warnings.warn(
        f"the traced call does not read {', '.join(paths[:most])}{more}: they stay whole, "
        "while what they would read has shrunk. A call that does read them (with "
        "train=True, or of another method) will fail or be wrong; if you need one, trace "
        "with apply= a call that returns its outputs too",
        stacklevel=stacklevel,
    )

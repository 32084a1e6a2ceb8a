"""Pruning in several rounds: each on the smaller network that the last one left.

Group after group or budget after budget, with fine-tuning in between. Every round traces
and measures the network as it is then; the plans of all rounds compose to one of the
original network.
"""

from __future__ import annotations

import glob
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune import budget as budgets
from jaxprune import trees
from jaxprune.errors import GraphError
from jaxprune.graph import ChannelGraph, build
from jaxprune.methods.measure import Calibration
from jaxprune.methods.reconstruct import (
    Progress,
    Reconstruction,
)
from jaxprune.records import Group, Plan, Slim
from jaxprune.runner import Runner
from jaxprune.schedule import limits_at
from jaxprune.selection import LIMIT_RULES, limits
from jaxprune.surgery import shrunk
from jaxprune.verify import verify as prove

# (smaller model, its variables) -> tuned variables
Finetune = Callable[[Any, Any], Any]
PROOF_EXAMPLES = 8


class Composed(NamedTuple):
    """A network after some rounds.

    Attributes:
      graph: of the network that the next round starts from.
      kept: {group: indices of the original that are left}.
      slim: what the last round made.
      left_whole: of all rounds, see `shrink`.
      error: the largest of the proofs, None without.
    """

    graph: ChannelGraph
    kept: Mapping[str, np.ndarray]
    slim: Slim
    left_whole: Mapping[str, str]
    error: float | None


def begin(graph: ChannelGraph) -> Composed:
    """The original network, before the first round."""
    kept = {group.name: np.arange(group.size) for group in graph.groups}
    slim = Slim(graph.handle.model, graph.variables, graph.full_plan(), {})
    return Composed(graph, kept, slim, {}, None)


def pruned(
    state: Composed, found: Reconstruction, data: Calibration, verify: bool
) -> Composed:
    """The state after a round's result is cut out of the current network."""
    slim = shrunk(state.graph, found.plan, found.variables)
    error = state.error
    if verify:
        error = max(error or 0.0, proof(state.graph, slim.plan, found.variables, data))
    kept = {
        name: indices[slim.plan[name]] if name in slim.plan else indices
        for name, indices in state.kept.items()
    }
    return Composed(
        state.graph,
        kept,
        slim,
        {**state.left_whole, **slim.report["left_whole"]},
        error,
    )


def retraced(
    state: Composed, finetune: Finetune | None, data: Calibration, ignore: Sequence[str]
) -> Composed:
    """The state with the slim network, fine-tuned, to start from."""
    slim = state.slim
    tuned = slim.variables
    if finetune is not None:
        tuned = _same_shapes(finetune(slim.model, slim.variables), slim.variables)
    handle = state.graph.handle.rebuild(tuned, slim.report["settings"])
    left = {name for name, kept in slim.plan.items() if kept.size > 1}
    tied = [names for names in state.graph.tied if left.intersection(names)]
    graph = build(handle, tuned, data.inputs, ignore=ignore, tied=tied)
    return state._replace(
        graph=graph, slim=Slim(handle.model, tuned, slim.plan, slim.report)
    )


def _same_shapes(tuned: Any, given: Any) -> Any:
    """The variables that fine-tuning returned.

    Raises:
      GraphError: they are not those it was given, trained.
    """
    found = {path: np.shape(leaf) for path, leaf in trees.flatten(tuned).items()}
    problems = [
        f"{path}: expected shape {np.shape(leaf)}, found {found.get(path, 'nothing')}"
        for path, leaf in trees.flatten(given).items()
        if found.get(path) != np.shape(leaf)
    ]
    if problems:
        raise GraphError(
            "finetune= must return the variables of the smaller model that it is "
            "given:\n  " + "\n  ".join(problems[:8])
        )
    return tuned


def as_slim(graph: ChannelGraph, state: Composed) -> Slim:
    """The slim network with the plan of the original `graph`."""
    report = {
        "left_whole": dict(state.left_whole),
        "settings": state.slim.report.get("settings", ()),
    }
    plan = graph.complete(state.kept)
    return Slim(state.slim.model, state.slim.variables, plan, report)


def layer_by_layer(
    run: Runner,
    graph: ChannelGraph,
    groups: Sequence[Group],
    plan: Plan | None,
    finetune: Finetune,
    *,
    order: Sequence[str],
    ignore: Sequence[str],
    verify: bool,
    on_progress: Progress | None,
) -> tuple[Slim, float | None]:
    """Prunes, shrinks and fine-tunes group after group; also the proofs' error."""
    state = begin(graph)
    for number, group in enumerate(groups):
        here = state.graph.group(group.name)
        only = run.one_group(state.graph, group.name, plan)
        found = run(state.graph, [here], only, order=order, on_progress=None)
        state = pruned(state, found, run.data, verify)
        state = retraced(state, finetune, run.data, ignore)
        if on_progress is not None:
            on_progress("prune", number + 1, len(groups))
    return as_slim(graph, state), state.error


def step_by_step(
    run: Runner,
    graph: ChannelGraph,
    groups: Sequence[Group],
    bound: budgets.Constraint,
    shares: Sequence[float],
    finetune: Finetune | None,
    *,
    order: Sequence[str],
    ignore: Sequence[str],
    verify: bool,
    batch: int | None,
    on_progress: Progress | None,
) -> tuple[Slim, float | None, list[dict[str, Any]]]:
    """Prunes all groups to one budget after another, down to that of `bound`.

    Fine-tunes between the steps, not after the last.

    Args:
      bound: the final budget, on the original graph, which can be met.
      shares: of what is removed in the end, done after each step.
      batch: examples that a latency is of.

    Returns:
      The slim network; the proofs' error; and what was asked and achieved at each
      step, as shares of the original, with the predicted latency where one is asked.
    """
    state, steps = begin(graph), []
    marks, here = {group.name: group.linked for group in groups}, bound
    for number, limit in enumerate(limits_at(bound.whole, bound.limit, list(shares))):
        started = time.perf_counter()
        if number:
            state = retraced(state, finetune, run.data, ignore)
            current = [
                replace(g, linked=marks[g.name])
                for g in state.graph.groups
                if g.name in marks
            ]
            here = budgets.constraint(state.graph, bound.budget, current, batch=batch)
        else:
            current = list(groups)
        here = here._replace(limit=limit, whole=bound.whole)
        selection = legal_here(run.selection, groups, current)
        plan, used = run.plan(state.graph, current, here, selection)
        found = run(state.graph, current, plan, order=order, on_progress=on_progress)
        state = pruned(state, found, run.data, verify)
        step: dict[str, Any] = {
            "asked": {bound.budget.kind: here.asked()},
            "achieved": budgets.achieved(graph, graph.complete(state.kept)),
            "seconds": time.perf_counter() - started,
        }
        if bound.table is not None:
            step["predicted_ms"] = budgets.predicted_ms(used, plan)
        steps.append(step)
        if on_progress is not None:
            on_progress("steps", number + 1, len(shares))
    return as_slim(graph, state), state.error, steps


def legal_here(
    selection: Mapping[str, Any], groups: Sequence[Group], current: Sequence[Group]
) -> dict[str, Any]:
    """Options of the selection whose shares and floors stay those of the original.

    Args:
      selection: as asked for the original `groups`.
      current: the same groups at the sizes they have now.
    """
    given = {n: selection[n] for n in LIMIT_RULES if n in selection}
    bounds = limits(groups, **given)
    full = {group.name: group.size for group in groups}
    floors, fixed = {}, {}
    for group in current:
        pattern = glob.escape(group.name)
        floors[pattern] = min(bounds.low[group.name], group.size)
        high = bounds.high[group.name]
        if high < full[group.name]:
            fixed[pattern] = min(high / group.size, 1.0)
    found = {n: v for n, v in selection.items() if n != "min_ratio"}
    return {**found, "min_keep": floors, "overrides": fixed}


def proof(graph: ChannelGraph, plan: Plan, variables: Any, data: Calibration) -> float:
    """max |masked original - slim| on a few calibration examples; on a whole batch where
    a part of one means nothing to the model (nodes of a graph beside its adjacency)."""
    few = jax.tree.map(lambda a: a[:PROOF_EXAMPLES], data.inputs)
    try:
        graph.retrace(few)
    except GraphError:
        few = data.inputs
    return prove(graph, plan, few, variables=variables)

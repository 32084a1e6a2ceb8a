"""prune(): the stages in order, by the method that is asked for; no arithmetic."""

from __future__ import annotations

import dataclasses
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from jaxprune import budget as budgets
from jaxprune.checks import check_values
from jaxprune.errors import BudgetError, ConfigError
from jaxprune.frameworks import FunctionHandle, handle_of
from jaxprune.graph import ChannelGraph
from jaxprune.latency import LatencyTable
from jaxprune.method_options import ARGUMENTS, parse_options
from jaxprune.methods.losses import check_callable
from jaxprune.methods.measure import Calibration, LossFn, cross_entropy
from jaxprune.methods.reconstruct import (
    Progress,
)
from jaxprune.methods.seed_ratio import seed_ratio
from jaxprune.records import Budget, Group, Plan, Slim
from jaxprune.rounds import Finetune, layer_by_layer, proof, step_by_step
from jaxprune.runner import Runner, conv_order
from jaxprune.schedule import removed_shares
from jaxprune.slicing import check_weights
from jaxprune.surgery import shrunk, warn_unread
from jaxprune.ties import settled, untied
from jaxprune.tracing import trace


def prune(
    model: Any,
    variables: Any,
    batches: Any = None,
    *,
    method: str = "cpli",
    macs: float | None = None,
    params: float | None = None,
    bytes: float | None = None,
    latency_ms: float | None = None,
    keep: float | None = None,
    loss_fn: LossFn | None = None,
    apply: Callable[..., Any] | None = None,
    ignore: Sequence[str] = (),
    finetune: Finetune | None = None,
    schedule: str | None = None,
    steps: int | None = None,
    latency_batch: int | None = None,
    seed: int = 0,
    verify: bool = True,
    on_progress: Progress | None = None,
    **options: Any,
) -> Slim:
    """The model pruned to the budget: traced, scored, refitted, shrunk and verified.

    Args:
      model, variables: a Flax Linen module and its variables, or a function and its
        parameters. For a Flax NNX object pass `prune(model, batches, ...)`.
      batches: calibration data, an iterable of (x, y) from the training split; y may
        be None where the method needs no loss. A one-shot iterator is read once.
      method: "cpli", "lasso" (He et al. 2017), "importance_redundancy", or the name
        of a criterion, which ranks the channels (see `methods()`).
      macs, params, bytes, keep: the share that remains, one of them: macs=0.5 halves
        the multiply-accumulates. importance_redundancy can do without, by its
        thresholds.
      latency_ms: instead of a share, what one batch may take on this device. The
        layers are measured here (`jaxprune.latency`), the table corrected by the slim
        model's time; `report["latency"]` has asked, predicted and measured.
      loss_fn: (outputs, y) -> per-example losses (B,); by default softmax
        cross-entropy of integer labels.
      apply: (model, variables, *inputs) -> outputs, see `trace`.
      ignore: name patterns of layers that keep all their channels.
      finetune: (model, variables) -> variables, called with the smaller model: between
        the steps of a schedule; without a schedule after each group, which makes
        every method go layer by layer, as importance_redundancy was published.
      schedule: "linear" or "cubic": prune in `steps` steps, each traced and measured
        on the network that the last one left; see `jaxprune.schedule`. The plan and
        `report["steps"]` are of the original. "one-shot": one step, the same as none.
      latency_batch: examples that latency_ms is of; by default a calibration batch.
      seed: of everything random.
      verify: prove the slim model equal to the masked original.
      on_progress: (stage, done, total).
      **options: of the selection (strategy and normalize for criteria, allocation for
        the methods that go layer by layer, round_to, min_keep, min_ratio, overrides),
        and of the method: the fields of `Refitting` (refit, passes, compensate,
        positions, ridge, ...: jaxprune.methods.refitting), for cpli of `Objective` (mu,
        feature_importance, ...: jaxprune.methods.cpli), for importance_redundancy of
        `Rules` (entropy_threshold, ...: jaxprune.methods.redundancy_rules).

    Raises:
      ConfigError: unknown method, option or schedule, or a value of a wrong type or
        out of range.
      DataError, ScoreError: calibration data, or a loss, of another form; weights that
        hold NaN; a model through which JAX takes no gradients, where they are needed.
      BudgetError: no plan meets the budget; says the nearest.
      EmissionError: the proof failed.

    Warns where groups that the source turned out not to follow cost the budget.
    """
    started = time.perf_counter()
    asked = budgets.one_budget(
        macs=macs, params=params, bytes=bytes, latency_ms=latency_ms, keep=keep
    )
    chosen = parse_options(method, options, asked)
    arguments = {
        "finetune": finetune, "on_progress": on_progress, "steps": steps,
        "latency_batch": latency_batch, "seed": seed, "verify": verify,
    }  # fmt: skip
    check_values(arguments, ARGUMENTS)
    shares = _shares(schedule, steps, asked, finetune)
    loss_fn = cross_entropy if loss_fn is None else loss_fn
    check_callable(loss_fn)
    if batches is None and isinstance(model, nnx.Module):
        variables, batches = None, variables
    data = batches if isinstance(batches, Calibration) else Calibration(batches)
    if variables is None:
        graph = trace(model, data.inputs, apply=apply, ignore=ignore)
    else:
        graph = trace(model, variables, data.inputs, apply=apply, ignore=ignore)
    check_weights(graph.variables)
    original = graph
    together = asked is not None and (finetune is None or shares is not None)
    graph, groups, stuck = _prunable(graph, together)
    run = Runner(
        method, groups, data, loss_fn, asked, seed, chosen, on_progress=on_progress
    )
    run.check_loss(graph)
    bound = None
    if asked is not None:
        bound = budgets.constraint(
            graph, asked, groups, batch=latency_batch, on_progress=on_progress
        )
        _check_reachable(bound, groups, run.selection, stuck)
    common: dict[str, Any] = {
        "order": conv_order(graph), "ignore": ignore, "verify": verify,
        "on_progress": on_progress,
    }  # fmt: skip
    stages: list[dict[str, Any]] = []
    if bound is not None and shares is not None:
        slim, error, stages = step_by_step(
            run, graph, groups, bound, shares, finetune, batch=latency_batch, **common
        )
        predicted = stages[-1].get("predicted_ms")
    else:
        plan, used = run.plan(graph, groups, bound)
        predicted = budgets.predicted_ms(used, plan)
        if finetune is not None:
            slim, error = layer_by_layer(run, graph, groups, plan, finetune, **common)
        else:
            found = run(
                graph, groups, plan, order=common["order"], on_progress=on_progress
            )
            slim = shrunk(graph, found.plan, found.variables)
            error = proof(graph, slim.plan, found.variables, data) if verify else None
    plan = untied(original, graph, slim.plan)
    report = {
        **slim.report,
        **_record(original, plan),
        "method": method,
        "asked": run.asked_record(),
        "left_whole": {**stuck, **run.stuck, **slim.report.get("left_whole", {})},
        "unread": list(graph.unread),
        "verify_max_abs_error": error,
        "seconds": time.perf_counter() - started,
    }
    if stages:
        report["steps"] = stages
    warn_unread(graph, slim.plan, stacklevel=3)
    _warn_missed(asked, report, stacklevel=3)
    if asked is not None and bound is not None and bound.table is not None:
        times = _latency(bound.table, asked, predicted, slim, apply)
        report["latency"] = times
        report["achieved"]["latency_ms"] = times["measured_ms"]
    if chosen.rules.preset == "seed":
        report["seed_ratio"] = seed_ratio(graph, slim.plan)
    return Slim(slim.model, slim.variables, plan, report)


def _shares(
    schedule: str | None,
    steps: int | None,
    asked: Budget | None,
    finetune: Finetune | None,
) -> list[float] | None:
    """What each step of a schedule has removed; None for pruning at once.

    Raises:
      ConfigError: a schedule without a budget or steps, or fine-tuning that would
        never be called.
    """
    if schedule is None:
        if steps is not None:
            raise ConfigError(f"steps={steps} needs schedule='linear' or 'cubic'")
        return None
    shares = removed_shares(schedule, steps)
    if asked is None:
        raise ConfigError(
            f"schedule={schedule!r} needs a budget to approach: pass macs=, params=, "
            "bytes=, latency_ms= or keep="
        )
    if len(shares) > 1:
        return shares
    if finetune is not None:
        raise ConfigError(
            f"schedule={schedule!r} with one step has nothing between steps for "
            "finetune=; take more steps, or leave the schedule out to go layer by layer"
        )
    return None


def _prunable(
    graph: ChannelGraph, together: bool
) -> tuple[ChannelGraph, list[Group], dict[str, str]]:
    """The graph, its groups that can shrink, and why the others cannot.

    Args:
      together: counts are chosen for all groups at once, so that some can be linked.

    Raises:
      BudgetError: there is none.
    """
    graph, marks, stuck = settled(graph, together)
    groups = [
        dataclasses.replace(g, linked=marks.get(g.name, ""))
        for g in graph.groups
        if g.name not in stuck
    ]
    if not graph.groups:
        raise BudgetError(
            "no group of channels can be pruned; print(jaxprune.trace(...)) says why. If "
            "the model returns its features as well, pass apply= with a call that "
            f"returns what the loss is made of:\n{graph}"
        )
    if not groups:
        reasons = [f"group {name!r}: {text}" for name, text in list(stuck.items())[:8]]
        remedy = (
            "Pass a Flax module itself instead of a function around it (apply= says how "
            "it is called), or prune"
            if isinstance(graph.handle, FunctionHandle)
            else "Prune"
        )
        raise BudgetError(
            f"none of the {len(stuck)} groups of channels can be pruned, because the "
            "model's source does not follow the widths of its arrays:\n  "
            + "\n  ".join(reasons)
            + f"\n{remedy} its program: plan = jaxprune.select(graph, scores, ...) and "
            "jaxprune.shrink(graph, plan) on graph = jaxprune.trace(..., replay=True)"
        )
    return graph, groups, dict(stuck)


def _check_reachable(
    bound: budgets.Constraint,
    groups: Sequence[Group],
    selection: Mapping[str, Any],
    stuck: Mapping[str, str],
) -> None:
    """Nothing, if the budget can be met.

    Raises:
      BudgetError: it cannot; says what stays whole, where that may be why.
    """
    try:
        budgets.check_feasible(bound, groups, selection)
    except BudgetError as error:
        if not stuck:
            raise
        raise BudgetError(
            f"{error}. {len(stuck)} groups stay whole, because the model's source does "
            f"not follow their widths: {list(stuck)[:8]}. Its program can shrink there: "
            "plan = jaxprune.select(graph, scores, ...) and jaxprune.shrink(graph, plan) "
            "on graph = jaxprune.trace(..., replay=True)"
        ) from error


def _warn_missed(
    asked: Budget | None, report: Mapping[str, Any], *, stacklevel: int
) -> None:
    """Warns where groups that turned out to stay whole cost the budget."""
    if asked is None or asked.kind not in report["achieved"]:
        return
    achieved = report["achieved"][asked.kind]
    if achieved > asked.value * (1 + 1e-9) and report["left_whole"]:
        whole = list(report["left_whole"].items())
        warnings.warn(
            f"asked for {asked.kind}={asked.value:g}, achieved {achieved:.4g}: "
            f"{len(whole)} groups stay whole, because the model's source does not "
            f"follow the counts that they were to keep: {dict(whole[:3])}; ask for less, "
            "or for other counts (round_to=, ignore=)",
            stacklevel=stacklevel + 1,
        )


def _record(graph: ChannelGraph, plan: Plan) -> dict[str, Any]:
    """What is left of the original network, for the report."""
    kept = {n: len(k) for n, k in plan.items()}
    return {
        "achieved": budgets.achieved(graph, plan),
        "groups": [
            {"name": g.name, "size": g.size, "kept": kept[g.name]} for g in graph.groups
        ],
    }


def _latency(
    table: LatencyTable, asked: Budget, predicted: float | None, slim: Slim, apply: Any
) -> dict[str, Any]:
    """The latency asked, predicted and measured on the slim model, JSON-ready.

    "base_again_ms" is the original's, measured beside the slim model: where it is not
    "base_ms", the device was faster or slower when the layers were measured.
    """
    handle, inputs = handle_of(slim.model, apply), table.graph.inputs
    measured = table.timer(lambda v, i: handle(v, *i), slim.variables, inputs)
    whole = table.graph
    again = table.timer(lambda v, i: whole.handle(v, *i), whole.variables, inputs)
    return {
        "batch": jax.tree.leaves(inputs)[0].shape[0],
        "base_ms": table.base_ms,
        "base_again_ms": again,
        "asked_ms": asked.value,
        "predicted_ms": predicted,
        "measured_ms": measured,
    }

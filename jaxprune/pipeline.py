"""prune(): the stages in order, by the method that is asked for; no arithmetic."""

from __future__ import annotations

import difflib
import inspect
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxprune import budget as budgets
from jaxprune import trees
from jaxprune.check import follow, slim_handle
from jaxprune.criteria import CRITERIA
from jaxprune.errors import BudgetError, ConfigError
from jaxprune.graph import ChannelGraph, build
from jaxprune.methods.cpli import chooser as cpli_chooser
from jaxprune.methods.cpli import cpli
from jaxprune.methods.importance_redundancy import chooser as redundancy_chooser
from jaxprune.methods.importance_redundancy import importance_redundancy
from jaxprune.methods.measure import Calibration, LossFn, cross_entropy
from jaxprune.methods.ranking import follow_plan
from jaxprune.methods.reconstruct import Chooser, Progress, Reconstruction
from jaxprune.methods.scores import score
from jaxprune.methods.seed_ratio import seed_ratio
from jaxprune.methods.sensitivity import sensitivity
from jaxprune.methods.taps import find_taps
from jaxprune.records import Budget, Group, Plan, Slim
from jaxprune.selection import allocate, uniform_counts
from jaxprune.surgery import shrink
from jaxprune.tracing import trace
from jaxprune.verify import verify as prove

Finetune = Callable[[Any, Any], Any]
LAYERWISE = ("cpli", "lasso", "importance_redundancy")
PROOF_EXAMPLES = 8
SELECTION = (
    "strategy", "normalize", "allocation", "round_to", "min_keep", "min_ratio",
    "overrides",
)  # fmt: skip


def methods() -> tuple[str, ...]:
    """Names that `prune(method=...)` takes."""
    return (*LAYERWISE, *CRITERIA)


def prune(
    model: Any,
    variables: Any,
    batches: Any = None,
    *,
    method: str = "cpli",
    macs: float | None = None,
    params: float | None = None,
    bytes: float | None = None,
    keep: float | None = None,
    loss_fn: LossFn | None = None,
    apply: Callable[..., Any] | None = None,
    ignore: Sequence[str] = (),
    finetune: Finetune | None = None,
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
      loss_fn: (outputs, y) -> per-example losses (B,); by default softmax
        cross-entropy of integer labels.
      apply: (model, variables, *inputs) -> outputs, see `trace`.
      ignore: name patterns of layers that keep all their channels.
      finetune: (model, variables) -> variables, called with the smaller model after
        each group; makes the methods go layer by layer.
      seed: of everything random.
      verify: prove the slim model equal to the masked original.
      on_progress: (stage, done, total).
      **options: of the selection (strategy and normalize for criteria, allocation for
        the methods that go layer by layer, round_to, min_keep, min_ratio, overrides), and of the method: see `jaxprune.methods`, for instance mu,
        feature_importance, refit, passes, positions, ridge.

    Raises:
      ConfigError: unknown method or option.
      BudgetError: no plan meets the budget; says the nearest.
      EmissionError: the proof failed.
    """
    started = time.perf_counter()
    if batches is None:
        variables, batches = None, variables
    data = batches if isinstance(batches, Calibration) else Calibration(batches)
    chosen, selection = _split_options(method, options)
    asked = budgets.one_budget(macs=macs, params=params, bytes=bytes, keep=keep)
    if asked is None and method != "importance_redundancy":
        raise BudgetError("no budget: pass macs=, params=, bytes= or keep=")
    if variables is None:
        graph = trace(model, data.inputs, apply=apply, ignore=ignore)
    else:
        graph = trace(model, variables, data.inputs, apply=apply, ignore=ignore)
    full = {g.name: np.arange(g.size) for g in graph.groups}
    half = {name: index[: max(1, index.size // 2)] for name, index in full.items()}
    _, stuck = follow(graph, graph.complete(half))
    groups = [g for g in graph.groups if g.name not in stuck]
    if not groups:
        raise BudgetError(
            "no group of channels can be pruned; print(jaxprune.trace(...)) says why:\n"
            f"{graph}"
        )
    loss_fn = loss_fn or cross_entropy
    run = _Run(
        method, data, loss_fn, asked, seed, chosen, selection, on_progress=on_progress
    )
    if finetune is None:
        found = run(graph, graph.variables, groups, on_progress=on_progress)
        slim = shrink(graph, found.plan, found.variables)
        error = _proof(graph, slim.plan, found.variables, data) if verify else None
    else:
        slim, error = _layer_by_layer(
            run, graph, groups, finetune, ignore, verify, on_progress
        )
    kept = {n: len(k) for n, k in slim.plan.items()}
    report = {
        **slim.report,
        "method": method,
        "asked": run.asked_record(),
        "achieved": budgets.achieved(graph, slim.plan),
        "groups": [
            {"name": g.name, "size": g.size, "kept": kept[g.name]} for g in graph.groups
        ],
        "left_whole": {**stuck, **slim.report.get("left_whole", {})},
        "verify_max_abs_error": error,
        "seconds": time.perf_counter() - started,
    }
    if chosen.get("preset") == "seed":
        report["seed_ratio"] = seed_ratio(graph, slim.plan)
    return Slim(slim.model, slim.variables, slim.plan, report)


def _split_options(
    method: str, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the method, and of the selection.

    Raises:
      ConfigError: an unknown method, or an option that neither takes.
    """
    if method not in methods():
        close = difflib.get_close_matches(method, methods(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(
            f"unknown method {method!r}; {hint}known: {', '.join(methods())}"
        )
    function = {
        "cpli": cpli,
        "lasso": cpli,
        "importance_redundancy": importance_redundancy,
    }.get(method, follow_plan)
    internal = {"groups", "fallback", "order", "loss_fn", "seed", "on_progress"}
    taken = {
        name
        for name, p in inspect.signature(function).parameters.items()
        if p.kind is inspect.Parameter.KEYWORD_ONLY
    } - internal
    if method == "lasso":
        taken -= {"selection", "mu", "feature_importance", "loss_term"}
    unknown = [n for n in options if n not in taken and n not in SELECTION]
    # A preset that is not asked for is no option.
    unknown = [n for n in unknown if not (n == "preset" and options[n] is None)]
    if unknown:
        raise ConfigError(
            f"method {method!r} has no option {unknown[0]!r}; it takes "
            f"{', '.join(sorted(taken | set(SELECTION)))}"
        )
    chosen = {n: v for n, v in options.items() if n in taken}
    if method == "lasso":
        chosen.update(mu=0.0, feature_importance=False)
    return chosen, {n: v for n, v in options.items() if n in SELECTION}


def _taken(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that the function has a parameter for."""
    names = inspect.signature(function).parameters
    return {name: value for name, value in options.items() if name in names}


class _Run:
    """One method with its options, to be run on a graph."""

    def __init__(
        self,
        method: str,
        data: Calibration,
        loss_fn: LossFn,
        asked: Budget | None,
        seed: int,
        options: Mapping[str, Any],
        selection: Mapping[str, Any],
        on_progress: Progress | None,
    ):
        self.method, self.data, self.loss_fn, self.asked = method, data, loss_fn, asked
        self.seed, self.options, self.selection = seed, options, selection
        self.on_progress = on_progress

    def asked_record(self) -> dict[str, Any]:
        """The budget and, for importance_redundancy, the thresholds; JSON-ready."""
        found: dict[str, Any] = {}
        if self.asked is not None:
            found[self.asked.kind] = self.asked.value
        if self.method == "importance_redundancy":
            defaults = inspect.signature(importance_redundancy).parameters
            for name in ("entropy_threshold", "similarity_threshold"):
                found[name] = self.options.get(name, defaults[name].default)
        return found

    def plan(self, graph: ChannelGraph, groups: Sequence[Group]) -> Plan | None:
        """The plan of a ranking method, or counts as a plan for the others."""
        if self.asked is None:
            return None
        bound = budgets.constraint(graph, self.asked, groups)
        if self.method in LAYERWISE:
            counts = self.counts(graph, groups, bound)
            return graph.complete({n: np.arange(k) for n, k in counts.items()})
        scores = score(
            graph,
            graph.variables,
            self.method,
            batches=self.data,
            loss_fn=self.loss_fn,
            seed=self.seed,
        )
        budget = {self.asked.kind: self.asked.value}
        return budgets.select(graph, scores, groups=groups, **budget, **self.selection)

    def counts(
        self,
        graph: ChannelGraph,
        groups: Sequence[Group],
        bound: budgets.Constraint,
    ) -> dict[str, int]:
        """Channels to keep: equal shares, or by what each group loses under refit."""
        limits = {k: v for k, v in self.selection.items() if k not in SELECTION[:3]}
        uniform = uniform_counts(groups, bound.cost_fn, bound.limit, **limits)
        how = self.selection.get("allocation", "sensitivity")
        if how not in ("sensitivity", "uniform"):
            raise ConfigError(
                f"allocation must be 'sensitivity' or 'uniform'; found {how!r}"
            )
        if how == "uniform":
            return uniform
        curves = sensitivity(
            graph,
            graph.variables,
            self.data,
            find_taps(graph),
            self.chooser(graph, groups, uniform),
            groups=groups,
            seed=self.seed,
            on_progress=self.on_progress,
            **_taken(sensitivity, self.options),
        )
        return allocate(groups, curves, bound.cost_fn, bound.limit, **limits)

    def chooser(
        self,
        graph: ChannelGraph,
        groups: Sequence[Group],
        counts: Mapping[str, int],
    ) -> Chooser:
        """The method's selection of one group in the network as it is."""
        fallback = score(graph, graph.variables, "l2")
        if self.method == "importance_redundancy":
            return redundancy_chooser(
                graph, graph.variables, self.data, groups=groups, fallback=fallback,
                loss_fn=self.loss_fn, seed=self.seed,
                **_taken(redundancy_chooser, self.options),
            )  # fmt: skip
        return cpli_chooser(
            graph, find_taps(graph), graph.variables, self.data, counts, fallback,
            self.loss_fn, **_taken(cpli_chooser, self.options),
        )  # fmt: skip

    def __call__(
        self,
        graph: ChannelGraph,
        variables: Any,
        groups: Sequence[Group],
        *,
        plan: Plan | None = None,
        order: Sequence[str] | None = None,
        on_progress: Progress | None = None,
    ) -> Reconstruction:
        """Chooses and refits these groups; `plan` overrides the budget's."""
        plan = self.plan(graph, groups) if plan is None else plan
        counts = None if plan is None else {n: len(k) for n, k in plan.items()}
        common: dict[str, Any] = {
            "groups": groups,
            "seed": self.seed,
            "on_progress": on_progress,
            **self.options,
        }
        if self.method in ("cpli", "lasso"):
            assert counts is not None
            return cpli(
                graph, variables, self.data, counts,
                fallback=score(graph, variables, "l2"), loss_fn=self.loss_fn, **common,
            )  # fmt: skip
        if self.method == "importance_redundancy":
            return importance_redundancy(
                graph, variables, self.data, counts,
                fallback=score(graph, variables, "l2"), loss_fn=self.loss_fn,
                order=conv_order(graph) if order is None else order, **common,
            )  # fmt: skip
        assert plan is not None
        return follow_plan(graph, variables, self.data, plan, **common)


def conv_order(graph: ChannelGraph) -> list[str]:
    """Names of the groups that convolutions make, in network order."""
    leaves = trees.flatten(graph.variables)
    ranks = {path: len(leaf.shape) for path, leaf in leaves.items()}
    return [
        g.name
        for g in graph.groups
        if any(ranks[slot.path] > 2 for slot in g.producers)
    ]


def _layer_by_layer(
    run: _Run,
    graph: ChannelGraph,
    groups: Sequence[Group],
    finetune: Finetune,
    ignore: Sequence[str],
    verify: bool,
    on_progress: Progress | None,
) -> tuple[Slim, float | None]:
    """Prunes, shrinks and fine-tunes group after group; plans compose."""
    plan, order = run.plan(graph, groups), conv_order(graph)
    kept = {g.name: np.arange(g.size) for g in graph.groups}
    current, worst, left, settings = graph, 0.0, {}, {}
    slim = Slim(graph.handle.model, graph.variables, graph.full_plan(), {})
    for number, group in enumerate(groups):
        here = current.group(group.name)
        only = None
        if plan is not None:
            only = current.complete({group.name: np.arange(len(plan[group.name]))})
            if run.method not in LAYERWISE:
                only = current.complete({group.name: plan[group.name]})
        found = run(current, current.variables, [here], plan=only, order=order)
        slim = shrink(current, found.plan, found.variables)
        if verify:
            worst = max(worst, _proof(current, slim.plan, found.variables, run.data))
        left.update(slim.report["left_whole"])
        settings.update({tuple(row[:2]): row for row in slim.report["settings"]})
        kept[group.name] = kept[group.name][slim.plan[group.name]]
        tuned = finetune(slim.model, slim.variables)
        handle = slim_handle(current, slim.plan, tuned)
        slim = Slim(handle.model, tuned, slim.plan, slim.report)
        current = build(handle, tuned, run.data.inputs, ignore=ignore)
        if on_progress is not None:
            on_progress("prune", number + 1, len(groups))
    report = {"left_whole": left, "settings": tuple(settings.values())}
    whole = graph.complete(kept)
    return Slim(slim.model, slim.variables, whole, report), worst if verify else None


def _proof(graph: ChannelGraph, plan: Plan, variables: Any, data: Calibration) -> float:
    few = jax.tree.map(lambda a: a[:PROOF_EXAMPLES], data.inputs)
    return prove(graph, plan, few, variables=variables)

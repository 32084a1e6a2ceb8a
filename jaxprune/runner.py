"""One method with its options: what it is asked, the plan it makes, and how it runs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune import budget as budgets
from jaxprune import trees
from jaxprune.criteria import CRITERIA
from jaxprune.errors import ConfigError
from jaxprune.graph import ChannelGraph
from jaxprune.methods.cpli import chooser as cpli_chooser
from jaxprune.methods.cpli import cpli
from jaxprune.methods.importance_redundancy import chooser as redundancy_chooser
from jaxprune.methods.importance_redundancy import importance_redundancy
from jaxprune.methods.measure import Calibration, LossFn
from jaxprune.methods.ranking import follow_plan
from jaxprune.methods.reconstruct import Chooser, Progress, Reconstruction
from jaxprune.methods.scores import score
from jaxprune.methods.sensitivity import Curves, sensitivity
from jaxprune.methods.taps import find_taps
from jaxprune.records import Budget, Group, Plan
from jaxprune.selection import allocate, uniform_counts

LAYERWISE = ("cpli", "lasso", "importance_redundancy")
SELECTION = (
    "strategy", "normalize", "allocation", "round_to", "min_keep", "min_ratio",
    "overrides",
)  # fmt: skip


def methods() -> tuple[str, ...]:
    """Names that `prune(method=...)` takes."""
    return (*LAYERWISE, *CRITERIA)


def split_options(
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


class Runner:
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

    def plan(
        self,
        graph: ChannelGraph,
        groups: Sequence[Group],
        bound: budgets.Constraint | None,
        selection: Mapping[str, Any] | None = None,
    ) -> tuple[Plan | None, budgets.Constraint | None]:
        """The plan of a ranking method, or counts as a plan for the others.

        Also the constraint it was made under, corrected for a latency.

        Args:
          bound: None for importance_redundancy without a budget: no plan.
          selection: options of the selection, instead of those of the call.

        Raises:
          BudgetError: the budget cannot be met; says the nearest.
        """
        if bound is None:
            return None, None
        selection = self.selection if selection is None else selection
        budgets.check_feasible(bound, groups, selection)
        if self.method in LAYERWISE:
            counts, bound = self.counts(graph, groups, bound, selection)
            return _as_plan(graph, counts), bound
        scores = score(
            graph,
            graph.variables,
            self.method,
            batches=self.data,
            loss_fn=self.loss_fn,
            seed=self.seed,
        )
        options = {n: v for n, v in selection.items() if n != "allocation"}
        return budgets.select_within(graph, scores, bound, groups, options)

    def counts(
        self,
        graph: ChannelGraph,
        groups: Sequence[Group],
        bound: budgets.Constraint,
        selection: Mapping[str, Any],
    ) -> tuple[dict[str, int], budgets.Constraint]:
        """Channels to keep: equal shares, or by what each group loses under refit."""
        limits = {k: v for k, v in selection.items() if k in budgets.LIMITS}
        how = selection.get("allocation", "sensitivity")
        if how not in ("sensitivity", "uniform"):
            raise ConfigError(
                f"allocation must be 'sensitivity' or 'uniform'; found {how!r}"
            )

        def uniform(bound: budgets.Constraint) -> dict[str, int]:
            budgets.check_feasible(bound, groups, limits)
            return uniform_counts(groups, bound.cost_fn, bound.limit, **limits)

        choose = uniform
        if how == "sensitivity":
            curves = self.curves(graph, groups, uniform(bound))

            def choose(bound: budgets.Constraint) -> dict[str, int]:
                budgets.check_feasible(bound, groups, limits)
                return allocate(groups, curves, bound.cost_fn, bound.limit, **limits)

        return budgets.settle(bound, choose, lambda counts: _as_plan(graph, counts))

    def curves(
        self, graph: ChannelGraph, groups: Sequence[Group], uniform: Mapping[str, int]
    ) -> Curves:
        """What each group loses at every count; `uniform` are counts to start from."""
        return sensitivity(
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

    def one_group(
        self, graph: ChannelGraph, name: str, plan: Plan | None
    ) -> Plan | None:
        """The part of a plan that is about one group, for a graph that still has it."""
        if plan is None:
            return None
        kept = plan[name]
        if self.method in LAYERWISE:
            kept = np.arange(kept.size)
        return graph.complete({name: kept})

    def __call__(
        self,
        graph: ChannelGraph,
        groups: Sequence[Group],
        plan: Plan | None,
        *,
        order: Sequence[str],
        on_progress: Progress | None = None,
    ) -> Reconstruction:
        """Chooses and refits these groups of the graph's own variables.

        Args:
          plan: from `plan`; None where the method's thresholds decide.
          order: names of all groups that convolutions make, in network order.
        """
        variables = graph.variables
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
                order=order, **common,
            )  # fmt: skip
        assert plan is not None
        return follow_plan(graph, variables, self.data, plan, **common)


def _as_plan(graph: ChannelGraph, counts: Mapping[str, int]) -> Plan:
    return graph.complete({name: np.arange(count) for name, count in counts.items()})


def conv_order(graph: ChannelGraph) -> list[str]:
    """Names of the groups that convolutions make, in network order."""
    leaves = trees.flatten(graph.variables)
    ranks = {path: len(leaf.shape) for path, leaf in leaves.items()}
    return [
        g.name
        for g in graph.groups
        if any(ranks[slot.path] > 2 for slot in g.producers)
    ]

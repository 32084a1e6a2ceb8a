"""One method with its options: what it is asked, the plan it makes, and how it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import numpy as np

from jaxprune import budget as budgets
from jaxprune import trees
from jaxprune.checks import (
    FLAG,
    FUNCTION,
    SEED,
    Rule,
    check_names,
    check_values,
    did_you_mean,
    one_of,
    optional,
    whole,
)
from jaxprune.criteria import CRITERIA, criterion
from jaxprune.errors import BudgetError, ConfigError
from jaxprune.graph import ChannelGraph
from jaxprune.methods.cpli import Objective, cpli
from jaxprune.methods.cpli import chooser as cpli_chooser
from jaxprune.methods.importance_redundancy import chooser as redundancy_chooser
from jaxprune.methods.importance_redundancy import importance_redundancy
from jaxprune.methods.losses import check_loss
from jaxprune.methods.measure import Calibration, LossFn
from jaxprune.methods.ranking import follow_plan
from jaxprune.methods.reconstruct import (
    Chooser,
    Progress,
    Reconstruction,
)
from jaxprune.methods.redundancy_rules import Rules
from jaxprune.methods.refitting import (
    Refitting,
)
from jaxprune.methods.scores import OF_GRADIENTS, score
from jaxprune.methods.sensitivity import Probe, sensitivity
from jaxprune.methods.taps import find_taps
from jaxprune.records import Budget, Group, Plan
from jaxprune.selection import (
    LIMIT_RULES,
    RANKING_RULES,
    allocate,
    limits,
    uniform_counts,
)

LAYERWISE = ("cpli", "lasso", "importance_redundancy")
# Limits of the widths, which all methods take; what to ignore is said to the trace.
WIDTHS = {name: rule for name, rule in LIMIT_RULES.items() if name != "ignore"}
ALLOCATION = {"allocation": one_of("sensitivity", "uniform")}
# Arguments of every call.
ARGUMENTS: dict[str, Rule] = {
    "finetune": optional(FUNCTION),
    "on_progress": optional(FUNCTION),
    "steps": optional(whole(1)),
    "latency_batch": optional(whole(1)),
    "seed": SEED,
    "verify": FLAG,
}


class Options(NamedTuple):
    """What a call's options say, by the part of the method that takes them.

    Attributes:
      objective: of cpli and lasso.
      rules: of importance_redundancy.
      refitting: of all.
      selection: widths and their limits, see `jaxprune.selection`.
    """

    objective: Objective
    rules: Rules
    refitting: Refitting
    selection: dict[str, Any]


def methods() -> tuple[str, ...]:
    """Names that `prune(method=...)` takes."""
    return (*LAYERWISE, *CRITERIA)


def parse_options(
    method: str, options: Mapping[str, Any], asked: Budget | None
) -> Options:
    """The options by part.

    Raises:
      ConfigError: an unknown method, an option that it does not take, or a bad value.
      BudgetError: no budget for a method that needs one.
    """
    if not one_of(*methods()).holds(method):
        raise ConfigError(
            f"unknown method {method!r}; {did_you_mean(method, methods())}known: "
            f"{', '.join(methods())}"
        )
    selection = WIDTHS | (ALLOCATION if method in LAYERWISE else RANKING_RULES)
    taken = _names(Refitting)
    if method == "cpli":
        taken |= _names(Objective)
    elif method == "lasso":
        taken |= {"nonnegative"}
    elif method == "importance_redundancy":
        taken = (taken | _names(Rules)) - {"passes"}
    # A preset that is not asked for is no option.
    given = {n: v for n, v in options.items() if (n, v) != ("preset", None)}
    check_names(given, {*taken, *selection}, f"method {method!r}")
    check_values(given, selection)
    if asked is None and method != "importance_redundancy":
        raise BudgetError(budgets.NO_BUDGET)
    if asked is None and "allocation" in given:
        raise ConfigError(
            "allocation shares out a budget: pass macs=, params=, bytes=, latency_ms= "
            "or keep=, or leave it out"
        )
    if given.get("preset") == "seed":
        fixed = sorted(selection.keys() & given.keys())
        if asked is not None or fixed:
            raise ConfigError(
                "preset='seed' prunes by its two thresholds: leave out "
                f"{', '.join(fixed) or 'macs, params, bytes, keep and latency_ms'}"
            )
    if method == "lasso":
        given |= {"selection": "lasso", "mu": 0.0, "feature_importance": False}
    return Options(
        Objective(**_of(Objective, given)),
        Rules(**_of(Rules, given)),
        Refitting(**_of(Refitting, given)),
        {n: v for n, v in given.items() if n in selection},
    )


def _names(record: type) -> set[str]:
    return {field.name for field in fields(record)}


def _of(record: type, options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that are fields of the record."""
    return {n: v for n, v in options.items() if n in _names(record)}


class Runner:
    """One method with its options, to be run on a graph.

    Args:
      groups: those of the original graph that are to be pruned.
    """

    def __init__(
        self,
        method: str,
        groups: Sequence[Group],
        data: Calibration,
        loss_fn: LossFn,
        asked: Budget | None,
        seed: int,
        options: Options,
        on_progress: Progress | None,
    ):
        self.method, self.data, self.loss_fn, self.asked = method, data, loss_fn, asked
        self.seed, self.options, self.selection = seed, options, options.selection
        self.on_progress = on_progress
        widths = {n: v for n, v in options.selection.items() if n in WIDTHS}
        self.legal = limits(groups, **widths)

    def check_loss(self, graph: ChannelGraph) -> None:
        """Nothing, if labels and loss fit the network and the method.

        Raises:
          ScoreError: they do not.
        """
        objective, user, without = self.options.objective, None, ""
        if self.method == "cpli" and (objective.mu > 0 or objective.feature_importance):
            user = "the classification loss"
            without = (
                ", or select by reconstruction alone with mu=0, "
                "feature_importance=False"
            )
        name = self.method
        if name == "importance_redundancy":
            name = self.options.rules.importance
        if name not in LAYERWISE and criterion(name).needs in OF_GRADIENTS:
            user = f"criterion {name!r}"
        if user is not None:
            check_loss(
                graph, graph.variables, self.data, self.loss_fn, user=user,
                without=without,
            )  # fmt: skip

    def asked_record(self) -> dict[str, Any]:
        """The budget and, for importance_redundancy, the thresholds; JSON-ready."""
        found: dict[str, Any] = {}
        if self.asked is not None:
            found[self.asked.kind] = self.asked.value
        if self.method == "importance_redundancy":
            for name in ("entropy_threshold", "similarity_threshold"):
                found[name] = getattr(self.options.rules, name)
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
        return budgets.select_within(graph, scores, bound, groups, selection)

    def counts(
        self,
        graph: ChannelGraph,
        groups: Sequence[Group],
        bound: budgets.Constraint,
        selection: Mapping[str, Any],
    ) -> tuple[dict[str, int], budgets.Constraint]:
        """Channels to keep: equal shares, or by what each group loses under refit, if the
        network loses less so."""
        widths = {k: v for k, v in selection.items() if k in WIDTHS}
        how = selection.get("allocation", "sensitivity")

        def uniform(bound: budgets.Constraint) -> dict[str, int]:
            budgets.check_feasible(bound, groups, widths)
            return uniform_counts(groups, bound.cost_fn, bound.limit, **widths)

        choose = uniform
        if how == "sensitivity":
            probe = self.probe(graph, groups, uniform(bound))
            curves = sensitivity(probe, self.on_progress)

            def choose(bound: budgets.Constraint) -> dict[str, int]:
                budgets.check_feasible(bound, groups, widths)
                found = allocate(groups, curves, bound.cost_fn, bound.limit, **widths)
                # What groups lose alone may not add up: layers that share a stem.
                return min(found, uniform(bound), key=probe.loss)

        return budgets.settle(bound, choose, lambda counts: _as_plan(graph, counts))

    def probe(
        self, graph: ChannelGraph, groups: Sequence[Group], uniform: Mapping[str, int]
    ) -> Probe:
        """What widths are tried on; `uniform` are counts to start from."""
        return Probe(
            graph,
            graph.variables,
            self.data,
            find_taps(graph),
            self.chooser(graph, groups, uniform),
            groups=groups,
            refitting=self.options.refitting,
            loss_fn=self.loss_fn,
            seed=self.seed,
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
                loss_fn=self.loss_fn, rules=self.options.rules, seed=self.seed,
            )  # fmt: skip
        return cpli_chooser(
            graph, find_taps(graph), graph.variables, self.data, counts, fallback,
            self.loss_fn, self.options.objective, ridge=self.options.refitting.ridge,
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
            "refitting": self.options.refitting,
            "seed": self.seed,
            "on_progress": on_progress,
        }
        if self.method in ("cpli", "lasso"):
            assert counts is not None
            return cpli(
                graph, variables, self.data, counts,
                fallback=score(graph, variables, "l2"), loss_fn=self.loss_fn,
                objective=self.options.objective, **common,
            )  # fmt: skip
        if self.method == "importance_redundancy":
            return importance_redundancy(
                graph, variables, self.data, counts, legal=self.legal,
                fallback=score(graph, variables, "l2"), loss_fn=self.loss_fn,
                rules=self.options.rules, order=order, **common,
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

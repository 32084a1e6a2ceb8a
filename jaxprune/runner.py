"""One method with its options: what it is asked, the plan it makes, and how it runs."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jaxprune import budget as budgets
from jaxprune import trees
from jaxprune.criteria import criterion
from jaxprune.graph import ChannelGraph
from jaxprune.method_options import LAYERWISE, WIDTHS, Options
from jaxprune.methods.cpli import chooser as cpli_chooser
from jaxprune.methods.cpli import cpli, loss_terms
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
from jaxprune.methods.refitting import group_taps
from jaxprune.methods.scores import OF_GRADIENTS, loss_scores, score
from jaxprune.methods.sensitivity import Probe, sensitivity
from jaxprune.methods.taps import find_taps
from jaxprune.records import Budget, Group, Plan
from jaxprune.repair import repaired
from jaxprune.selection import (
    LIMIT_RULES,
    allocate,
    limits,
    uniform_counts,
)


class Runner:
    """One method with its options, to be run on a graph.

    Args:
      groups: those of the original graph that are to be pruned.

    Attributes:
      stuck: groups that were found to follow none of the counts tried, and why.
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
        self.stuck: dict[str, str] = {}
        self._loss_terms: weakref.WeakKeyDictionary[
            ChannelGraph, dict[str, np.ndarray]
        ] = weakref.WeakKeyDictionary()

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
        """The plan of a ranking method, or counts as a plan for the others; groups that
        the model's source follows at no count near those asked for stay whole.

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
        given = {name: selection[name] for name in LIMIT_RULES if name in selection}
        low = limits(groups, **given).low
        plan, used, shortened = self._planned(graph, groups, bound, selection)
        plan, stuck = repaired(graph, plan, shortened, low, given.get("round_to", 1))
        if not stuck:
            return plan, used
        self.stuck.update(stuck)
        return self.plan(
            graph, [g for g in groups if g.name not in stuck], bound, selection
        )

    def _planned(
        self,
        graph: ChannelGraph,
        groups: Sequence[Group],
        bound: budgets.Constraint,
        selection: Mapping[str, Any],
    ) -> tuple[Plan, budgets.Constraint, Callable[[Mapping[str, int]], Plan]]:
        """Plan and constraint, and what makes the plan with fewer channels of groups."""
        budgets.check_feasible(bound, groups, selection)
        if self.method in LAYERWISE:
            counts, bound = self.counts(graph, groups, bound, selection)
            return (
                _as_plan(graph, counts),
                bound,
                lambda fewer: _as_plan(graph, {**counts, **fewer}),
            )
        scores = score(
            graph,
            graph.variables,
            self.method,
            batches=self.data,
            loss_fn=self.loss_fn,
            seed=self.seed,
        )
        plan, bound = budgets.select_within(graph, scores, bound, groups, selection)
        best = {n: kept[np.argsort(-scores[n][kept])] for n, kept in plan.items()}
        return (
            plan,
            bound,
            lambda fewer: graph.complete(
                {**plan, **{n: best[n][:k] for n, k in fewer.items()}}
            ),
        )

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
        fallback = self.fallback(graph, groups)
        if self.method == "importance_redundancy":
            return redundancy_chooser(
                graph, graph.variables, self.data, groups=groups, fallback=fallback,
                loss_fn=self.loss_fn, rules=self.options.rules, seed=self.seed,
            )  # fmt: skip
        return cpli_chooser(
            graph, counts, fallback, self.loss_terms(graph), self.options.objective,
            ridge=self.options.refitting.ridge,
        )  # fmt: skip

    def loss_terms(self, graph: ChannelGraph) -> dict[str, np.ndarray]:
        """Those of cpli, measured once: the widths are tried with them too."""
        if graph not in self._loss_terms:
            self._loss_terms[graph] = loss_terms(
                graph, graph.variables, self.data, self.loss_fn, self.options.objective
            )
        return self._loss_terms[graph]

    def fallback(
        self, graph: ChannelGraph, groups: Sequence[Group]
    ) -> dict[str, np.ndarray]:
        """Scores (C,) for groups that no tap reads: by the classification loss where the
        method weighs it, else by the weights' norm."""
        found = score(graph, graph.variables, "l2")
        taps = find_taps(graph)
        unread = [group for group in groups if not group_taps(taps, group)]
        if unread and self.method == "cpli" and self.options.objective.mu > 0:
            found |= loss_scores(
                graph, graph.variables, self.data, self.loss_fn, unread
            )
        return found

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
                fallback=self.fallback(graph, groups), loss=self.loss_terms(graph),
                objective=self.options.objective, **common,
            )  # fmt: skip
        if self.method == "importance_redundancy":
            return importance_redundancy(
                graph, variables, self.data, counts, legal=self.legal,
                fallback=self.fallback(graph, groups), loss_fn=self.loss_fn,
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

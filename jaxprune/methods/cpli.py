"""CPLI: selection by reconstruction, classification loss and feature importance.

Guo, Ouyang, Xu, AAAI 2020, arXiv:2003.06757; the objective stands in
`jaxprune.solver.cpli`. With mu = 0 and no suppression it is He et al. 2017
(arXiv:1707.06168), `method="lasso"`.

The paper's LASSO is `selection="lasso"`. By default the same terms are weighed channel by
channel with the refit included, which the second step does anyway.

Our reading where the paper leaves room: the gates sit on what the consumers read, so
that dL/db_c needs no hooks; t_c is the mean over examples of |dL/db_c| (the signed
mean of a trained network is noise about zero); s_j weighs the consumer's outputs by
the t of the channels they become, and is zero for those that the next group, at its
own count, will not keep. Groups that no kernel reads (the features in which queries meet
keys), or only kernels that a scan stacks, have nothing to rebuild: they go by the
classification loss alone (`taylor_examples`), without it by the norm of their weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from jaxprune.checks import FLAG, check_values, number, one_of
from jaxprune.errors import ConfigError
from jaxprune.graph import ChannelGraph
from jaxprune.methods.measure import (
    Calibration,
    LossFn,
    gate_gradients,
)
from jaxprune.methods.reconstruct import (
    Chooser,
    Progress,
    Reconstruction,
    reconstruct,
)
from jaxprune.methods.refitting import (
    Choice,
    Refitting,
    Term,
)
from jaxprune.methods.taps import Tap, find_taps
from jaxprune.records import Group
from jaxprune.solver.cpli import (
    group_system,
    scaled_scores,
    select_gates,
    suppression,
)
from jaxprune.solver.elimination import elimination_order
from jaxprune.solver.gram import GateSystem

LossTerm = Literal["example", "batch"]
Selection = Literal["lasso", "elimination"]
# Rows of a consumer from which on elimination, which inverts its whole Gram matrix in
# float64 (0.5 GB at this size, time by the cube), makes way for LASSO.
WIDEST = 8192


@dataclass(frozen=True)
class Objective:
    """What the selection minimises.

    Attributes:
      selection: "lasso", the paper's, which weighs channels with W as it is, or
        "elimination" (`jaxprune.solver.elimination`), which weighs them by what is
        lost once the others are refitted, with the same two terms; groups with a
        consumer of more than `WIDEST` rows take "lasso" all the same. The default keeps
        0.3 to 1.8 points more on CIFAR-10 networks, means of three seeds
        (BENCHMARKS.md).
      mu: weight of the classification loss; 0 needs no labels.
      feature_importance: weigh what the next stage keeps (s_j).
      loss_term: "example" for the mean |dL/db|, "batch" for |mean dL/db|.
      nonnegative: LASSO gates b >= 0; without, of either sign.

    Raises:
      ConfigError: an unknown value, or one of a wrong type or out of range.
    """

    selection: Selection = "elimination"
    mu: float = 1.0
    feature_importance: bool = True
    loss_term: LossTerm = "example"
    nonnegative: bool = True

    def __post_init__(self):
        rules = {
            "selection": one_of(*get_args(Selection)),
            "mu": number(0),
            "feature_importance": FLAG,
            "loss_term": one_of(*get_args(LossTerm)),
            "nonnegative": FLAG,
        }
        check_values(vars(self), rules)
        if not self.nonnegative and self.selection != "lasso":
            raise ConfigError(
                "nonnegative=False is about LASSO gates: set selection='lasso' too"
            )


def cpli(
    graph: ChannelGraph,
    variables: Any,
    calibration: Calibration,
    counts: Mapping[str, int],
    *,
    groups: Sequence[Group],
    fallback: Mapping[str, np.ndarray],
    loss: Mapping[str, np.ndarray],
    objective: Objective,
    refitting: Refitting,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Reconstruction:
    """Chooses `counts[group]` channels of every group and refits their consumers.

    Args:
      graph: traced with inputs of the calibration's batch shape.
      counts: channels to keep, by group name.
      fallback: scores (C,) for groups that no tap reads.
      loss: t (C,) by group name, of `loss_terms`.
      The others are those of `reconstruct`.
    """
    taps = find_taps(graph)
    choose = chooser(graph, counts, fallback, loss, objective, ridge=refitting.ridge)

    def choose_group(group: Group, terms: Sequence[Term], observe: Any) -> Choice:
        del observe
        return Choice(choose(group, terms, counts[group.name]))

    return reconstruct(
        graph,
        variables,
        calibration,
        taps,
        choose_group,
        groups=groups,
        refitting=refitting,
        seed=seed,
        on_progress=on_progress,
    )


def loss_terms(
    graph: ChannelGraph,
    variables: Any,
    calibration: Calibration,
    loss_fn: LossFn,
    objective: Objective,
) -> dict[str, np.ndarray]:
    """{group name: t (C,)} of the groups that a tap reads; none where t has no weight.

    Args:
      graph: traced with inputs of the calibration's batch shape.
      loss_fn: (outputs, y) -> per-example losses (B,).
    """
    if objective.mu == 0 and not objective.feature_importance:
        return {}
    gates = gate_gradients(graph, find_taps(graph), variables, calibration, loss_fn)
    return {
        name: found[1] if objective.loss_term == "example" else np.abs(found[0])
        for name, found in gates.items()
    }


def chooser(
    graph: ChannelGraph,
    counts: Mapping[str, int],
    fallback: Mapping[str, np.ndarray],
    loss: Mapping[str, np.ndarray],
    objective: Objective,
    *,
    ridge: float | None = None,
) -> Chooser:
    """The selection of one group at any count.

    Arguments are those of `cpli`; `counts` is for the suppression.
    """
    mu, importance = objective.mu, objective.feature_importance

    def weighted(terms: Sequence[Term]):
        return [
            (
                term.moments,
                term.kernel,
                term.row_channel,
                output_weight(graph, term.tap, loss, counts) if importance else None,
            )
            for term in terms
        ]

    # The same measurement is asked for several counts.
    systems: dict[str, tuple[Sequence[Term], GateSystem]] = {}
    orders: dict[str, tuple[Sequence[Term], np.ndarray]] = {}

    def same(known: Sequence[Term], terms: Sequence[Term]) -> bool:
        return len(known) == len(terms) and all(
            a.moments is b.moments and np.array_equal(a.kernel, b.kernel)
            for a, b in zip(known, terms, strict=True)
        )

    def system(group: Group, terms: Sequence[Term]) -> GateSystem:
        known = systems.get(group.name)
        if known is None or not same(known[0], terms):
            centred = all(term.tap.intercept is not None for term in terms)
            found = group_system(weighted(terms), group.size, centred=centred)
            known = systems[group.name] = (terms, found)
        return known[1]

    def gone(group: Group, terms: Sequence[Term], number: int) -> np.ndarray:
        known = orders.get(group.name)
        if known is None or not same(known[0], terms) or known[1].size < number:
            found = elimination_order(
                weighted(terms), group.size, group.size - number,
                loss_scores=loss.get(group.name), mu=mu, ridge=ridge,
                centred=[term.tap.intercept is not None for term in terms],
            )  # fmt: skip
            known = orders[group.name] = (terms, found)
        return known[1][:number]

    def choose(group: Group, terms: Sequence[Term], keep: int) -> np.ndarray:
        if keep >= group.size:
            return np.arange(group.size)
        if not terms:
            return top(fallback[group.name], keep)
        narrow = all(term.tap.rows <= WIDEST for term in terms)
        if objective.selection == "elimination" and narrow:
            removed = gone(group, terms, group.size - keep)
            return np.setdiff1d(np.arange(group.size), removed)
        scores = scaled_scores(loss.get(group.name, np.zeros(group.size)))
        return select_gates(
            system(group, terms), scores, keep, mu=mu, nonnegative=objective.nonnegative
        ).kept

    return choose


def top(scores: np.ndarray, keep: int) -> np.ndarray:
    """The `keep` highest scores' indices; ties go to the lower index."""
    order = np.lexsort((np.arange(scores.size), -np.asarray(scores, np.float64)))
    return np.sort(order[:keep])


def output_weight(
    graph: ChannelGraph,
    tap: Tap,
    loss: Mapping[str, np.ndarray],
    counts: Mapping[str, int],
) -> np.ndarray | None:
    """s (N,) of a consumer's outputs, or None where they are not one group's channels."""
    for group in graph.groups:
        columns = tap.column_channels(group)
        if (columns < 0).any() or group.name not in loss:
            continue
        weight = suppression(loss[group.name], counts.get(group.name, group.size))
        return weight[columns]
    return None

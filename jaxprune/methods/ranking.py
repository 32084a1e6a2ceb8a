"""Methods that score every channel first and keep the highest within the budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxprune.graph import ChannelGraph
from jaxprune.methods.measure import Calibration
from jaxprune.methods.reconstruct import (
    Progress,
    Reconstruction,
    reconstruct,
)
from jaxprune.methods.refitting import (
    Choice,
    Refitting,
    Term,
)
from jaxprune.methods.taps import find_taps
from jaxprune.records import Group, Plan


def follow_plan(
    graph: ChannelGraph,
    variables: Any,
    calibration: Calibration,
    plan: Plan,
    *,
    groups: Sequence[Group],
    refitting: Refitting,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Reconstruction:
    """Prunes to a plan that was made beforehand, refitting as `reconstruct` does.

    With refit="none" it is the bare criterion, as published; on trained CIFAR networks
    that leaves accuracy at chance at half the MACs, and so does "bias".
    """

    def choose(group: Group, terms: Sequence[Term], observe: Any) -> Choice:
        del terms, observe
        return Choice(plan[group.name])

    return reconstruct(
        graph,
        variables,
        calibration,
        () if refitting.how == "none" else find_taps(graph),
        choose,
        groups=groups,
        second=refitting.how == "lstsq",
        refitting=refitting,
        seed=seed,
        on_progress=on_progress,
    )

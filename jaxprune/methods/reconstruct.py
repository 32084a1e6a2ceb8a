"""Group after group: choose channels, then refit the layers that read them.

The network keeps its full size throughout: removed channels are zero rows of their
consumers' kernels, so that every pass runs the same compiled program.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxprune import trees
from jaxprune.criteria.redundancy import Fold, Redundancy
from jaxprune.errors import ConfigError
from jaxprune.graph import ChannelGraph
from jaxprune.methods.activations import Place
from jaxprune.methods.measure import Calibration
from jaxprune.methods.relay import Relay
from jaxprune.methods.shortcuts import find_shortcuts
from jaxprune.methods.taps import Tap, by_kernel
from jaxprune.records import Group, Plan
from jaxprune.slicing import mask_variables
from jaxprune.solver.refit import refit as solve_refit
from jaxprune.stats.moments import Moments, covariances

Refit = Literal["none", "bias", "lstsq"]
Passes = Literal["sequential", "single"]


class Term(NamedTuple):
    """One consumer of a group, measured.

    Attributes:
      tap: the (first) use of its kernel.
      moments: of X in the network pruned so far and Y in the original.
      kernel: W (R, N), the current weights.
      row_channel: int (R,), the group's channel of each row, -1 for none.
    """

    tap: Tap
    moments: Moments
    kernel: np.ndarray
    row_channel: np.ndarray


class Choice(NamedTuple):
    """What was decided for a group.

    Attributes:
      kept: indices of the channels that stay.
      redundancy, fold: channels that others stand for, and by which line; their
        weights move to the survivors' before the refit.
    """

    kept: np.ndarray
    redundancy: Redundancy | None = None
    fold: Fold | None = None


# One pass over a group's activations: (state, update, limit=examples) -> state.
Observe = Callable[..., Any]
# (group, measured consumers, passes over its activations; None without a place) -> choice
Choose = Callable[[Group, Sequence[Term], Observe | None], Choice]
# (group, measured consumers, how many stay) -> kept indices
Chooser = Callable[[Group, Sequence[Term], int], np.ndarray]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Refitting:
    """How consumers are measured and refitted.

    Attributes:
      refit: "lstsq" solves for the consumers' kernels, "bias" only shifts their
        intercept by the mean of what was removed, "none" leaves the rest as it is.
        None: the method's own, "lstsq" but for the script's preset.
      passes: "sequential" measures X anew after each group, so that later layers
        correct earlier errors; "single" measures all groups in one pass.
      compensate: where a layer's output enters a sum, refit it to what the sum is
        short of, the other branch's error included (`jaxprune.methods.shortcuts`).
      positions: samples an example and layer; None for all.
      ridge: of the refit, see `solver.refit`; None for the rule.

    Raises:
      ConfigError: an unknown value.
    """

    refit: Refit | None = None
    passes: Passes = "sequential"
    compensate: bool = True
    positions: int | None = 10
    ridge: float | None = None

    def __post_init__(self):
        if self.refit not in (None, "none", "bias", "lstsq"):
            raise ConfigError(
                f"refit must be none, bias or lstsq; found {self.refit!r}"
            )
        if self.passes not in ("sequential", "single"):
            raise ConfigError(
                f"passes must be sequential or single; found {self.passes!r}"
            )

    @property
    def how(self) -> Refit:
        return self.refit or "lstsq"


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
    keep: dict[str, np.ndarray] = {}
    measured: dict[str, Moments] = {}
    shortcuts = {}
    if sequential and refitting.compensate:
        shortcuts = find_shortcuts(graph, taps, groups)
    relay = Relay(
        graph,
        variables,
        calibration,
        positions=refitting.positions,
        shortcuts=shortcuts,
    )
    places = places or {}
    of_group = [group_taps(taps, group) for group in groups]
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
            relay.advance(ahead, current)
        if sequential:
            measured = relay.moments(mine, current, seed=seed + number, second=second)
        leaves = trees.flatten(current)
        terms = measured_terms(group, mine, measured, leaves)
        observe = None
        if place is not None:
            observe = partial(relay.observe, place, current)
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
    return Reconstruction(graph.complete(keep), current, residuals)


def group_taps(taps: Sequence[Tap], group: Group) -> list[Tap]:
    """The taps that read channels of the group."""
    return [tap for tap in taps if np.isin(tap.row_needs, group.units).any()]


def measured_terms(
    group: Group,
    taps: Sequence[Tap],
    measured: Mapping[str, Moments],
    leaves: Mapping[str, Any],
) -> list[Term]:
    """The group's consumers, one a kernel, with their moments and weights."""
    return [
        Term(
            uses[0],
            measured[name],
            uses[0].matrix(leaves[uses[0].path]),
            uses[0].row_channels(group),
        )
        for name, uses in by_kernel(taps).items()
    ]


def refit_consumers(
    terms: Sequence[Term],
    choice: Choice,
    leaves: Mapping[str, Any],
    original: Mapping[str, Any],
    mask: np.ndarray,
    refitting: Refitting,
    residuals: dict[str, float],
) -> dict[str, Any]:
    """New leaves of all consumers; `residuals` is filled by their names.

    Args:
      leaves: of the network pruned so far.
      original: of the network that the moments' Y are from.
      mask: bool by unit, what is kept.
    """
    changed: dict[str, Any] = {}
    for term in terms:
        now = {**leaves, **changed}
        changed |= _refitted(term, choice, now, original, mask, refitting, residuals)
    return changed


def _refitted(
    term: Term,
    choice: Choice,
    leaves: Mapping[str, Any],
    original: Mapping[str, Any],
    mask: np.ndarray,
    refitting: Refitting,
    residuals: dict[str, float],
) -> dict[str, Any]:
    """New leaves of one consumer: kernel and intercept."""
    refit = refitting.how
    if refit == "none" and choice.fold is None:
        return {}
    tap, keep = term.tap, term.tap.row_keep(mask)
    place = tap.intercept
    kernel, shift = folded(term, choice)
    # Folding moves the intercept as it is. Targets are without the original's, so
    # what is fitted to them starts from that: a kernel that reads several groups is
    # refitted once for each.
    start = leaves if refit == "none" else original
    changed: dict[str, Any] = {tap.path: tap.unmatrix(kernel, leaves[tap.path])}
    if refit == "lstsq":
        solved = solve_refit(
            term.moments,
            keep,
            kernel=kernel,
            ridge=refitting.ridge,
            intercept=place is not None,
        )
        changed[tap.path] = tap.unmatrix(solved.kernel, leaves[tap.path])
        residuals[tap.name] = float(np.mean(solved.residual))
        shift = solved.intercept
    elif refit == "bias":
        cov = covariances(term.moments)
        shift = cov.mean_y - cov.mean_x @ (kernel * keep[:, None])
    if place is not None:
        changed[place] = tap.shifted(shift, leaves[place], start[place])
    return changed


def folded(term: Term, choice: Choice) -> tuple[np.ndarray, np.ndarray]:
    """W (R, N) with removed twins' rows moved to their survivors', and the shift (N,).

        W_i += alpha W_j,   shift += gamma sum_window W_j    for a_j ~ alpha a_i + gamma

    The rows of a channel are in the same order (window positions) for every channel.
    """
    kernel, shift = term.kernel, np.zeros(term.kernel.shape[1])
    if choice.redundancy is None or choice.fold is None:
        return kernel, shift
    kernel = kernel.copy()
    pairs = zip(*choice.redundancy[:2], *choice.fold[:2], strict=True)
    for removed, survivor, alpha, gamma in pairs:
        rows = term.row_channel == removed
        kernel[term.row_channel == survivor] += alpha * term.kernel[rows]
        shift += gamma * term.kernel[rows].sum(0)
    return kernel, shift

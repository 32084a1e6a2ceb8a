"""One consumer of a group: its measurement, and its weights without removed channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np

from jaxprune.checks import FLAG, check_values, number, one_of, optional, whole
from jaxprune.criteria.redundancy import Fold, Redundancy
from jaxprune.errors import ScoreError
from jaxprune.methods.taps import Tap, by_kernel
from jaxprune.records import Group
from jaxprune.solver.refit import finite_covariances
from jaxprune.solver.refit import refit as solve_refit
from jaxprune.stats.moments import Moments

Refit = Literal["none", "bias", "lstsq"]
Passes = Literal["sequential", "single"]


@dataclass(frozen=True)
class Refitting:
    """How consumers are measured and refitted.

    Attributes:
      refit: "lstsq" solves for the consumers' kernels, "bias" only shifts their
        intercept by the mean of what was removed, "none" leaves the rest as it is.
        None: the method's own, "lstsq" but for the script's preset.
      passes: "sequential" measures X anew after each group, so that later layers
        correct earlier errors; "single" measures all groups in one pass.
      refit_again: when all groups are pruned, refit once more what was refitted before
        a layer ahead of it was pruned.
      compensate: where a layer's output enters a sum, refit it to what the sum is
        short of, the other branch's error included (`jaxprune.methods.shortcuts`).
      positions: samples an example and layer; None for all.
      ridge: of the refit, see `solver.refit`; None for the rule.

    Raises:
      ConfigError: an unknown value, or one of a wrong type or out of range.
    """

    refit: Refit | None = None
    passes: Passes = "sequential"
    refit_again: bool = True
    compensate: bool = True
    positions: int | None = 10
    ridge: float | None = None

    def __post_init__(self):
        rules = {
            "refit": optional(one_of(*get_args(Refit))),
            "passes": one_of(*get_args(Passes)),
            "refit_again": FLAG,
            "compensate": FLAG,
            "positions": optional(whole(1)),
            "ridge": optional(number(0)),
        }
        check_values(vars(self), rules)

    @property
    def how(self) -> Refit:
        return self.refit or "lstsq"


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


def group_taps(taps: Sequence[Tap], group: Group) -> list[Tap]:
    """The taps that read channels of the group."""
    return [tap for tap in taps if np.isin(tap.row_needs, group.units).any()]


def measured_terms(
    group: Group,
    taps: Sequence[Tap],
    measured: Mapping[str, Moments],
    leaves: Mapping[str, Any],
) -> list[Term]:
    """The group's consumers, one a kernel, with their moments and weights.

    Raises:
      ScoreError: activations that overflow, or are NaN.
    """
    kernels = by_kernel(taps)
    for name in kernels:
        _check_finite(name, measured[name])
    return [
        Term(
            uses[0],
            measured[name],
            uses[0].matrix(leaves[uses[0].path]),
            uses[0].row_channels(group),
        )
        for name, uses in kernels.items()
    ]


def _check_finite(name: str, moments: Moments) -> None:
    for what, mean, square in (
        ("reads", moments.mean_x, np.diagonal(moments.xx)),
        ("makes", moments.mean_y, moments.yy),
    ):
        wrong = ~np.isfinite(mean)
        wrong[: len(square)] |= ~np.isfinite(square)
        if wrong.any():
            raise ScoreError(
                f"{int(wrong.sum())} of {wrong.size} features that {name} {what} overflow "
                "or are NaN on the calibration data (their squares are summed in "
                "float32): check the inputs' scale, or run the model in float32"
            )


def refit_consumers(
    terms: Sequence[Term],
    choice: Choice,
    leaves: Mapping[str, Any],
    original: Mapping[str, Any],
    mask: np.ndarray,
    refitting: Refitting,
    residuals: dict[str, float],
) -> dict[str, Any]:
    """New leaves of all consumers of a group; arguments as for `refitted`."""
    if refitting.how == "none" and choice.fold is None:
        return {}
    changed: dict[str, Any] = {}
    for term in terms:
        now = {**leaves, **changed}
        kernel, shift = folded(term, choice)
        if refitting.how == "none":
            changed |= _moved(term.tap, kernel, shift, now, now)
        else:
            changed |= refitted(
                term.tap, term.moments, kernel, now, original, mask, refitting,
                residuals,
            )  # fmt: skip
    return changed


def refitted(
    tap: Tap,
    moments: Moments,
    kernel: np.ndarray,
    leaves: Mapping[str, Any],
    original: Mapping[str, Any],
    mask: np.ndarray,
    refitting: Refitting,
    residuals: dict[str, float],
) -> dict[str, Any]:
    """New leaves of one consumer: its kernel and its intercept.

    Args:
      kernel: W (R, N), the prior; as it stays where only the intercept is fitted.
      leaves: of the network pruned so far.
      original: of the network that the moments' Y are from. Y is without its
        intercept, so the new one starts there, however often the tap is refitted.
      mask: bool by unit, what is kept.
      residuals: filled by the tap's name.
    """
    keep = tap.row_keep(mask)
    if refitting.how == "lstsq":
        solved = solve_refit(
            moments,
            keep,
            kernel=kernel,
            ridge=refitting.ridge,
            intercept=tap.intercept is not None,
        )
        residuals[tap.name] = float(np.mean(solved.residual))
        return _moved(tap, solved.kernel, solved.intercept, leaves, original)
    cov = finite_covariances(moments, centred=True)
    shift = cov.mean_y - cov.mean_x @ (kernel * keep[:, None])
    return _moved(tap, kernel, shift, leaves, original)


def _moved(
    tap: Tap,
    kernel: np.ndarray,
    shift: np.ndarray,
    leaves: Mapping[str, Any],
    start: Mapping[str, Any],
) -> dict[str, Any]:
    """The leaves with a kernel, and an intercept shifted from that of `start`."""
    changed = {tap.path: tap.unmatrix(kernel, leaves[tap.path])}
    place = tap.intercept
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

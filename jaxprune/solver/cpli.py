"""CPLI channel selection: reconstruction, classification loss, feature importance.

Guo, Ouyang, Xu, "Channel Pruning Guided by Classification Loss and Feature
Importance", AAAI 2020, arXiv:2003.06757.

    minimise over b:  1/2 b^T G b - q^T b  -  mu * sum_c t_c b_c  +  lambda * ||b||_1
                      b >= 0,  ||b||_0 = keep exactly

- G, q: the gate system of the group's consumers (gram.py), for the features of the
  next layer weighted by s_j: 0 where the next stage removes the feature.
- t_c: first-order estimate of what the classification loss gains from channel c.
- lambda: not chosen, but followed from above until `keep` gates are non-zero.

Where the paper leaves the scales open we normalise: the sum over consumers by the
mean diagonal of G, so that lambda and mu mean the same in every layer, and t to mean
absolute value 1. mu = 0 with s = 1 is He, Zhang, Sun 2017 (arXiv:1707.06168).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jaxprune.errors import ScoreError
from jaxprune.solver.gram import GateSystem, combine, gate_system
from jaxprune.solver.lasso import Selection, select_exact
from jaxprune.stats.moments import Moments

# Moments are float32 sums: a channel whose energy beyond the selected ones is below
# this share is a copy of them up to rounding.
REDUNDANT = 1e-6


def cpli_select(
    terms: Sequence[tuple[Moments, np.ndarray, np.ndarray, np.ndarray | None]],
    loss_scores,
    keep: int,
    *,
    mu: float = 1.0,
    nonnegative: bool = True,
    centred: bool = True,
    balance: bool = True,
) -> Selection:
    """The `keep` channels that minimise the objective of this module.

    Args:
      terms: one for each consumer: its moments of (R,) rows and (N,) targets, kernel
        (R, N), row_channel int (R,) with -1 for rows always present, and the
        output weights s (N,) or None for 1.
      loss_scores: t (C,), larger = the loss needs the channel more.
      keep: how many channels stay.
      mu: weight of the classification loss; 0 for reconstruction alone.
      centred: the consumers have an intercept (a bias, or a BatchNorm's mean).
      balance: consumers count alike, see `gram.combine`.

    Raises:
      ScoreError: no term, shapes that do not fit, NaN, or `keep` not in 1..C.
    """
    t = scaled_scores(loss_scores)
    system = group_system(terms, t.size, centred=centred, balance=balance)
    return select_gates(system, t, keep, mu=mu, nonnegative=nonnegative)


def group_system(
    terms: Sequence[tuple[Moments, np.ndarray, np.ndarray, np.ndarray | None]],
    channels: int,
    *,
    centred: bool = True,
    balance: bool = True,
) -> GateSystem:
    """The gate system of all consumers together; arguments as for `cpli_select`."""
    if not terms:
        raise ScoreError(
            "no consumer to reconstruct: select this group by a score instead"
        )
    systems = [
        gate_system(
            moments,
            kernel,
            row_channel,
            channels=channels,
            output_weight=weight,
            centred=centred,
        )
        for moments, kernel, row_channel, weight in terms
    ]
    return combine(systems, balance=balance)


def select_gates(
    system: GateSystem, t, keep: int, *, mu: float = 1.0, nonnegative: bool = True
) -> Selection:
    """As `cpli_select`, from a gate system and scores scaled to mean 1."""
    scale = np.diagonal(system.gram).mean()
    gram, linear = system.gram, system.linear
    if scale > 0:
        gram, linear = gram / scale, linear / scale
    pull = linear + mu * t
    return select_exact(
        gram,
        pull,
        keep,
        nonnegative=nonnegative,
        tie_break=pull,
        dependent=REDUNDANT,
    )


def scaled_scores(scores) -> np.ndarray:
    """Scores (C,) in float64 divided by their mean absolute value; zeros stay zeros.

    Raises:
      ScoreError: not a vector, or NaN or infinity in it.
    """
    t = np.asarray(scores, np.float64)
    if t.ndim != 1 or not np.isfinite(t).all():
        raise ScoreError(
            f"loss scores must be a finite vector (C,); found shape {t.shape} with "
            f"{int((~np.isfinite(t)).sum())} values that are NaN or infinite"
        )
    mean = np.abs(t).mean() if t.size else 0.0
    return t / mean if mean > 0 else t


def suppression(
    next_scores, keep: int, *, floor: float = 0.0, importance: bool = True
) -> np.ndarray:
    """Output weights s (N,) with mean square 1: how much each feature matters next.

    The features that the next stage will remove, all but the `keep` largest of
    `next_scores` (ties: lower index stays), get the share `floor` of the others'
    mean. The others weigh by the square root of their score, so that s^2 is
    proportional to it, or alike without `importance`.

    Raises:
      ScoreError: scores not finite, or `keep` not in 1..N.
    """
    scores = np.abs(scaled_scores(next_scores))
    size = scores.size
    if not 1 <= keep <= size:
        raise ScoreError(f"keep must lie in 1..{size}, the features; found {keep}")
    stays = np.zeros(size, bool)
    stays[np.lexsort((np.arange(size), -scores))[:keep]] = True
    weight = np.ones(size)
    if importance and scores.any():
        weight = np.sqrt(scores)
    weight[~stays] = floor * weight[stays].mean()
    return weight / np.sqrt(np.mean(weight**2))

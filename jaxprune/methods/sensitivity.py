"""How much each group loses at each width under refit, and the widths that lose least.

A layer-by-layer method is told how many channels each layer keeps. Here that is
measured: every group alone is pruned to a few widths, its consumers refitted, and the
divergence of the network's outputs from the original's taken on calibration batches
(no labels needed). `selection.allocate` solves the knapsack over the curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.graph import ChannelGraph
from jaxprune.methods.measure import Calibration
from jaxprune.methods.reconstruct import (
    Chooser,
    Progress,
)
from jaxprune.methods.refitting import (
    Choice,
    Refitting,
    group_taps,
    measured_terms,
    refit_consumers,
)
from jaxprune.methods.relay import measure_moments
from jaxprune.methods.taps import Tap
from jaxprune.records import Group
from jaxprune.slicing import mask_variables

# Shares of a group's channels at which its loss is measured; 1 loses nothing. The
# logarithm of the loss is close to linear in between (a factor of 2 to 3 an eighth).
SHARES = (0.15, 0.35, 0.55, 0.75, 0.9)
# Examples whose outputs are compared: divergences vary little between examples.
EXAMPLES = 250

Curves = dict[str, np.ndarray]


def sensitivity(
    graph: ChannelGraph,
    variables: Any,
    calibration: Calibration,
    taps: Sequence[Tap],
    choose: Chooser,
    *,
    groups: Sequence[Group],
    refitting: Refitting,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Curves:
    """{group: (C + 1,)}: divergence of the outputs with 0, 1, ..., C channels kept.

    One pass for the moments of all groups, then a forward run of some examples
    for each group and share: the network keeps its shapes, so nothing is recompiled.
    """
    used = {
        (tap.site, tap.part): tap for group in groups for tap in group_taps(taps, group)
    }
    measured = measure_moments(
        graph, list(used.values()), variables, variables, calibration,
        positions=refitting.positions, seed=seed,
    )  # fmt: skip
    leaves = trees.flatten(variables)
    loss = divergence(graph, variables, calibration)
    curves: Curves = {}
    for number, group in enumerate(groups):
        terms = measured_terms(group, group_taps(taps, group), measured, leaves)
        counts = sorted({max(1, round(share * group.size)) for share in SHARES})
        counts = [count for count in counts if count < group.size]
        losses = []
        for count in counts:
            kept = choose(group, terms, count)
            plan = graph.complete({group.name: kept})
            changed = refit_consumers(
                terms,
                Choice(kept),
                leaves,
                leaves,
                graph.unit_mask(plan),
                refitting,
                {},
            )
            pruned = mask_variables(graph, plan, trees.replace(variables, changed))
            losses.append(loss(pruned))
        curves[group.name] = curve(counts, losses, group.size)
        if on_progress is not None:
            on_progress("sensitivity", number + 1, len(groups))
    return curves


def curve(counts: Sequence[int], losses: Sequence[float], size: int) -> np.ndarray:
    """(size + 1,) losses at every count from those measured, 0 at `size`.

    Linear in the logarithm between the measured counts and below the first (along the
    first two), linear in the loss above the last. Never rising: what rises is noise.
    """
    falling = np.maximum.accumulate(np.maximum(losses, 1e-12)[::-1])[::-1]
    logs = np.log(falling)
    every = np.arange(size + 1)
    found = np.exp(np.interp(every, counts, logs))
    if len(counts) > 1:
        slope = (logs[1] - logs[0]) / (counts[1] - counts[0])
        below = every < counts[0]
        found[below] = np.exp(logs[0] + slope * (every[below] - counts[0]))
    above = every > counts[-1]
    share = (every[above] - counts[-1]) / (size - counts[-1])
    found[above] = falling[-1] * (1 - share)
    return found


def divergence(graph: ChannelGraph, variables: Any, calibration: Calibration):
    """A function of variables: mean divergence of the outputs from the original's.

    Kullback-Leibler between the softmax of two-dimensional floating-point outputs
    (logits), the relative squared error of any others; averaged over at
    least `EXAMPLES` examples.
    """
    batches = []
    for inputs, _, weight in calibration:
        batches.append((inputs, weight))
        if len(batches) * calibration.size >= EXAMPLES:
            break
    run = jax.jit(lambda v, i: jax.tree.leaves(graph.handle(v, *i)))
    references = [run(variables, inputs) for inputs, _ in batches]

    @jax.jit
    def compare(variables, inputs, weight, reference):
        total = 0.0
        for found, wanted in zip(
            jax.tree.leaves(graph.handle(variables, *inputs)), reference, strict=True
        ):
            if not jnp.issubdtype(wanted.dtype, jnp.floating):
                continue
            found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
            if wanted.ndim == 2 and wanted.shape[1] > 1:
                log_p = jax.nn.log_softmax(wanted)
                gap = (jnp.exp(log_p) * (log_p - jax.nn.log_softmax(found))).sum(1)
            else:
                axes = tuple(range(1, wanted.ndim))
                gap = jnp.square(found - wanted).sum(axes)
                gap = gap / jnp.maximum(jnp.square(wanted).sum(axes), 1e-12)
            total = total + (gap * weight).sum()
        return total

    count = sum(float(np.sum(weight)) for _, weight in batches)

    def loss(pruned: Mapping[str, Any]) -> float:
        parts = [
            compare(pruned, inputs, weight, reference)
            for (inputs, weight), reference in zip(batches, references, strict=True)
        ]
        return float(sum(map(float, parts)) / count)

    return loss

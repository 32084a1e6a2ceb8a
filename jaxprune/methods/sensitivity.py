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
from jaxprune.graph import ChannelGraph, evaluate, tree_arguments
from jaxprune.graph.examples import layouts
from jaxprune.graph.reductions import Reductions
from jaxprune.methods.losses import are_logits
from jaxprune.methods.measure import Calibration, LossFn
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
from jaxprune.methods.relay import Measurement, Relay, measure_moments
from jaxprune.methods.taps import Tap
from jaxprune.records import Group, Plan
from jaxprune.slicing import mask_variables
from jaxprune.stats.moments import Moments

# Shares of a group's channels at which its loss is measured; 1 loses nothing. The
# logarithm of the loss is close to linear in between (a factor of 2 to 3 an eighth).
SHARES = (0.15, 0.35, 0.55, 0.75, 0.9)
# Examples whose outputs are compared: divergences vary little between examples.
EXAMPLES = 250
# Share of the outputs' relative error beside their divergence: too little to matter
# where that tells widths apart.
SURE = 1e-3

Curves = dict[str, np.ndarray]


class Probe:
    """The original network, measured once, to try widths on.

    `loss` prunes groups to some counts, all by the moments of the original, and runs
    the network, which keeps its shapes: nothing is recompiled, and nothing measured
    anew but what consumers read behind norms over the channels that go.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        variables: Any,
        calibration: Calibration,
        taps: Sequence[Tap],
        choose: Chooser,
        *,
        groups: Sequence[Group],
        refitting: Refitting,
        loss_fn: LossFn,
        seed: int = 0,
    ) -> None:
        self.graph, self.variables, self.refitting = graph, variables, refitting
        self.groups, self._choose = groups, choose
        self._taps = {group.name: group_taps(taps, group) for group in groups}
        used = {
            (tap.site, tap.part): tap for mine in self._taps.values() for tap in mine
        }
        self._measured = measure_moments(
            graph, list(used.values()), variables, variables, calibration,
            positions=refitting.positions, seed=seed,
        )  # fmt: skip
        self._relay = Relay(
            graph, variables, calibration, positions=refitting.positions,
            given={site for site, _ in used},
        )  # fmt: skip
        self._reductions, self._seed = Reductions(graph), seed
        self._measurements: dict[str, Measurement] = {}
        self._divergence = divergence(graph, variables, calibration, loss_fn)

    def loss(self, counts: Mapping[str, int]) -> float:
        """Divergence of the outputs with that many channels kept of the named groups."""
        original = trees.flatten(self.variables)
        current, keep, plan = self.variables, {}, None
        for group in self.groups:
            if counts.get(group.name, group.size) >= group.size:
                continue
            leaves = trees.flatten(current)
            terms = measured_terms(
                group, self._taps[group.name], self._measured, leaves
            )
            kept = self._choose(group, terms, counts[group.name])
            keep[group.name] = np.sort(kept)
            plan = self.graph.complete(keep)
            alone = self.graph.complete({group.name: kept})
            if terms and self._reductions.first(alone) is not None:
                measured = self._normed(group, plan)
                terms = measured_terms(group, self._taps[group.name], measured, leaves)
            changed = refit_consumers(
                terms,
                Choice(kept),
                leaves,
                original,
                self.graph.unit_mask(plan),
                self.refitting,
                {},
            )
            current = mask_variables(self.graph, plan, trees.replace(current, changed))
        return self._divergence(current, plan)

    def _normed(self, group: Group, plan: Plan) -> dict[str, Moments]:
        """Moments of a group's consumers with inputs normed over what the plan leaves;
        the layers before them are the original's."""
        if group.name not in self._measurements:
            taps = self._taps[group.name]
            self._measurements[group.name] = self._relay.measurement(taps)
        measure = self._measurements[group.name]
        return measure(self.variables, plan, seed=self._seed)


def sensitivity(probe: Probe, on_progress: Progress | None = None) -> Curves:
    """{group: (C + 1,)}: divergence of the outputs with 0, 1, ..., C channels kept.

    Of each group alone, measured at some shares and interpolated.
    """
    curves: Curves = {}
    for number, group in enumerate(probe.groups):
        counts = sorted({max(1, round(share * group.size)) for share in SHARES})
        counts = [count for count in counts if count < group.size]
        losses = [probe.loss({group.name: count}) for count in counts]
        curves[group.name] = curve(counts, losses, group.size)
        if on_progress is not None:
            on_progress("sensitivity", number + 1, len(probe.groups))
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


def divergence(
    graph: ChannelGraph, variables: Any, calibration: Calibration, loss_fn: LossFn
):
    """A function of variables and their plan: mean divergence of the outputs from the
    original's; reductions over channels pass those by that are gone.

    Kullback-Leibler between the softmax of logits (`losses.are_logits`) and `SURE` of
    their relative squared error, which tells widths apart where the softmax is sure of
    one class; the relative squared error of any other outputs. Averaged over at least
    `EXAMPLES` examples.
    """
    batches = []
    for inputs, _, weight in calibration:
        batches.append((inputs, weight))
        if len(batches) * calibration.size >= EXAMPLES:
            break
    run = jax.jit(lambda v, i: jax.tree.leaves(graph.handle(v, *i)))
    references = [run(variables, inputs) for inputs, _ in batches]
    graph = graph.retrace(calibration.inputs)
    outputs, reductions = layouts(graph).outputs, Reductions(graph)

    def pruned_outputs(variables, inputs, left):
        if left is None:
            return jax.tree.leaves(graph.handle(variables, *inputs))
        arguments, before = tree_arguments(variables, inputs), reductions.before(left)
        return evaluate(graph.closed, arguments, before=before, loops=True)

    @jax.jit
    def compare(variables, inputs, left, weight, reference):
        total = 0.0
        for found, wanted, layout in zip(
            pruned_outputs(variables, inputs, left),
            reference,
            outputs,
            strict=True,
        ):
            if not jnp.issubdtype(wanted.dtype, jnp.floating):
                continue
            found, wanted = found.astype(jnp.float32), wanted.astype(jnp.float32)
            logits = are_logits(wanted, calibration, loss_fn)
            if layout is None:  # all examples as one, counted as often
                logits, found, wanted = False, found[None], wanted[None]
            else:
                logits = logits and layout.axis == 0
                found, wanted = layout.first(found), layout.first(wanted)
            gap = _relative_error(found, wanted)
            if logits:
                wanted, found = jax.nn.log_softmax(wanted), jax.nn.log_softmax(found)
                divergence = (jnp.exp(wanted) * (wanted - found)).sum(-1)
                divergence = divergence.reshape(len(gap), -1).mean(1)
                gap = jnp.maximum(divergence, 0) + SURE * gap
            total = total + (gap * weight).sum()
        return total

    count = sum(float(np.sum(weight)) for _, weight in batches)

    def loss(pruned: Mapping[str, Any], plan: Plan | None = None) -> float:
        left = reductions.left(plan)
        parts = [
            compare(pruned, inputs, left, weight, reference)
            for (inputs, weight), reference in zip(batches, references, strict=True)
        ]
        return float(sum(map(float, parts)) / count)

    return loss


def _relative_error(found: jax.Array, wanted: jax.Array) -> jax.Array:
    """(B,): squared error of each example's output, relative to its square."""
    axes = tuple(range(1, wanted.ndim))
    error = jnp.square(found - wanted).sum(axes)
    return error / jnp.maximum(jnp.square(wanted).sum(axes), 1e-12)

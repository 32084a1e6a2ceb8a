"""Moments for one group after another, without running the network from its start.

Layer-by-layer pruning measures each group in the network pruned so far. Whatever lies
before the first consumer that is still to change is final: its activations are kept
for every calibration batch, and the next measurement goes on from there. For a chain
of layers all measurements together run the network once, and compile it once. Where
the activations would not fit into `MEMORY`, they stay where they are and more is run
again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.graph import ChannelGraph
from jaxprune.graph.flat import State, flatten
from jaxprune.methods.measure import Calibration
from jaxprune.methods.taps import Tap, by_kernel, rows_and_targets
from jaxprune.stats import moments as moments_lib
from jaxprune.stats.moments import Moments

# Bytes of activations kept for all calibration batches of both networks.
MEMORY = 4 * 2**30


class Relay:
    """Activations of the original and of the current network at one step.

    Args:
      graph: traced with inputs of the calibration's batch shape.
      original: variables of the original network.
      positions: samples an example and tap; None for all.
      memory: bytes that the activations may take.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        original: Any,
        calibration: Calibration,
        *,
        positions: int | None,
        memory: int = MEMORY,
    ):
        self._original = jax.tree.leaves(original)
        self._program = flatten(graph.closed, graph.records, len(self._original))
        self._graph, self._calibration = graph, calibration
        self._positions, self._memory = positions, memory
        self._number = {s.site: k for k, s in enumerate(self._program.steps)}
        self._start = 0
        # Per batch the states of both networks; None: from the inputs.
        self._states: list[tuple[State, State]] | None = None

    def _begin(self, inputs: Sequence[Any]) -> State:
        slots = dict(zip(self._program.inputs, jax.tree.leaves(inputs), strict=True))
        return {slot: slots[slot] for slot in self._program.live(0)}

    def _batches(self):
        """Yields (states of both networks, weights) of every batch."""
        for number, (inputs, _, weight) in enumerate(self._calibration):
            if self._states is None:
                state = self._begin(inputs)
                yield (state, state), weight
            else:
                yield self._states[number], weight

    def advance(self, taps: Sequence[Tap], current: Any) -> None:
        """Moves up to the first of the taps, all those that are still to change."""
        stop = min((self._number[tap.site] for tap in taps), default=self._start)
        if stop <= self._start:
            return
        run = jax.jit(partial(self._program.run, start=self._start, stop=stop))
        leaves = jax.tree.leaves(current)
        moved: list[tuple[State, State]] = []
        for (first, second), _ in self._batches():
            if not moved:
                size = 2 * _bytes(jax.eval_shape(run, self._original, first))
                if size * self._calibration.count > self._memory:
                    return
            moved.append((run(self._original, first), run(leaves, second)))
        self._start, self._states = stop, moved

    def moments(
        self, taps: Sequence[Tap], current: Any, *, seed: int
    ) -> dict[str, Moments]:
        """{kernel path: moments}: X in the current network, Y in the original one.

        Kernels used at several places gather all their uses.
        """
        groups = by_kernel(taps)
        if not groups:
            return {}
        sums = {
            path: moments_lib.zeros(uses[0].rows, uses[0].outputs)
            for path, uses in groups.items()
        }
        step = jax.jit(self._step(taps), donate_argnums=0)
        leaves, key = jax.tree.leaves(current), jax.random.key(seed)
        for number, (states, weight) in enumerate(self._batches()):
            batch_key = jax.random.fold_in(key, number)
            sums = step(sums, self._original, leaves, states, weight, batch_key)
        return sums

    def _step(self, taps: Sequence[Tap]):
        at = {self._number[tap.site]: tap for tap in taps}
        stop = max(at) + 1

        def capture(variables, state, operand: bool) -> Mapping[int, jax.Array]:
            found: dict[int, jax.Array] = {}

            def after(number, operands, results):
                if number in at:
                    found[number] = (
                        operands[at[number].image] if operand else results[0]
                    )

            self._program.run(variables, state, self._start, stop, after)
            return found

        def step(sums, original, current, states, weight, key):
            targets = capture(original, states[0], False)
            images = capture(current, states[1], True)
            result = dict(sums)
            for number, tap in at.items():
                x, y = rows_and_targets(
                    tap,
                    self._program.steps[number].eqn,
                    images[number],
                    targets[number],
                    jax.random.fold_in(key, number),
                    self._positions,
                )
                weights = jnp.broadcast_to(weight[:, None], x.shape[:2]).reshape(-1)
                result[tap.path] = moments_lib.update(
                    result[tap.path],
                    x.reshape(-1, tap.rows),
                    y.reshape(-1, tap.outputs),
                    weights,
                )
            return result

        return step


def _bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def measure_moments(
    graph: ChannelGraph,
    taps: Sequence[Tap],
    original: Any,
    current: Any,
    calibration: Calibration,
    *,
    positions: int | None,
    seed: int,
) -> dict[str, Moments]:
    """{kernel path: moments} of all taps in one pass over the calibration batches."""
    relay = Relay(graph, original, calibration, positions=positions)
    return relay.moments(taps, current, seed=seed)

"""Statistics of one group after another, without running the network from its start.

Layer-by-layer pruning measures each group in the network pruned so far. Whatever lies
before the first consumer that is still to change is final: its activations are kept
for every calibration batch, and the next measurement goes on from there. For a chain
of layers the measurements of all groups together run the network once (each pass over
a group's own layer counts once more), and compile it once. Where the activations would
not fit into `MEMORY`, they stay where they are and more is run again.

The network pruned so far keeps its size; its norms over channels run over those that are
left, as in the slim network (`jaxprune.graph.reductions`).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.graph import ChannelGraph, Site
from jaxprune.graph.flat import After, State, flatten
from jaxprune.graph.reductions import Left, Reductions
from jaxprune.methods.activations import Place, channels_last
from jaxprune.methods.measure import Calibration
from jaxprune.methods.shortcuts import Shortcut, captured_sites, from_operands
from jaxprune.methods.taps import Tap, output_map, rows_and_targets
from jaxprune.records import Plan
from jaxprune.stats import example_positions
from jaxprune.stats import moments as moments_lib
from jaxprune.stats.moments import Moments

# Bytes of activations kept for all calibration batches of both networks.
MEMORY = 4 * 2**30
# Bytes of one batch's rows that may lie beside each other.
ROWS = 2**30
# (variables of the network pruned so far, its plan, seed=) -> moments by tap's name.
Measurement = Callable[..., dict[str, Moments]]


class Relay:
    """Activations of the original and of the current network at one step.

    Args:
      graph: traced with inputs of the calibration's batch shape.
      original: variables of the original network.
      positions: samples an example and tap; None for all.
      shortcuts: {tap's site: the sum} whose other branch the targets make up for.
      given: sites of contractions whose results in the current network are taken from
        the original one, so that no error reaches the layers behind them.
      memory: bytes that the activations may take.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        original: Any,
        calibration: Calibration,
        *,
        positions: int | None,
        shortcuts: Mapping[Site, Shortcut] | None = None,
        given: Collection[Site] = (),
        memory: int = MEMORY,
    ):
        self._original = jax.tree.leaves(original)
        self._program = flatten(graph.closed, graph.records, len(self._original))
        self._graph, self._calibration = graph, calibration
        self._positions, self._memory = positions, memory
        self._shortcuts, self._given = shortcuts or {}, given
        self._reductions = Reductions(graph)
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

    def _run(
        self,
        variables: Sequence[Any],
        state: State,
        stop: int,
        after: After | None = None,
        left: Left | None = None,
    ) -> State:
        """From the step reached to another; left: what the plan leaves, if it is."""
        before = None if left is None else self._reductions.before(left)
        return self._program.run(variables, state, self._start, stop, after, before)

    def advance(
        self, sites: Iterable[Site], current: Any, plan: Plan | None = None
    ) -> None:
        """Moves up to the first of the sites, all that are still to be measured.

        Args:
          current: variables of the network pruned so far.
          plan: what it keeps; None for all.
        """
        stop = min((self._number[site] for site in sites), default=self._start)
        if stop <= self._start:
            return
        # One program for both networks: the original's norms run over all channels.
        run = jax.jit(partial(self._run, stop=stop))
        all_left = self._reductions.left(self._graph.full_plan())
        leaves, left = jax.tree.leaves(current), self._reductions.left(plan)
        moved: list[tuple[State, State]] = []
        for (first, second), _ in self._batches():
            if not moved:
                made = jax.eval_shape(run, self._original, first, left=all_left)
                if 2 * _bytes(made) * self._calibration.count > self._memory:
                    return
            moved.append(
                (
                    run(self._original, first, left=all_left),
                    run(leaves, second, left=left or all_left),
                )
            )
        self._start, self._states = stop, moved

    def moments(
        self,
        taps: Sequence[Tap],
        current: Any,
        plan: Plan | None = None,
        *,
        seed: int,
        second: bool = True,
    ) -> dict[str, Moments]:
        """{tap's name: moments}: X in the current network, Y in the original one.

        Kernels used at several places gather all their uses. Without `second` only
        the means are taken. `current` and `plan` are those of `advance`.
        """
        if not taps:
            return {}
        return self.measurement(taps, second=second)(current, plan, seed=seed)

    def measurement(self, taps: Sequence[Tap], *, second: bool = True) -> Measurement:
        """(current, plan, seed=) -> the `moments` of these taps, compiled once."""
        # The blocks of a kernel are measured together.
        uses = list({tap.site: tap for tap in taps}.values())
        # One program for all drops each tap's rows before it makes the next one's.
        together = self._row_bytes(uses) > ROWS
        rows = self._rows(uses) if together else jax.jit(self._rows(uses))

        def step(sums, original, current, states, left, weight, chosen):
            found, new = rows(original, current, states, left, chosen), dict(sums)
            for tap in uses:
                update = _update if tap.parts == 1 else _update_blocks
                new[tap.path] = update(new[tap.path], *found[tap.site], weight)
            return new

        if together:
            step = jax.jit(step, donate_argnums=0)

        def measure(current, plan=None, *, seed):
            leaves, key, seen = jax.tree.leaves(current), jax.random.key(seed), 0
            left = self._reductions.left(plan)
            sums = {tap.path: _zeros(tap, second) for tap in uses}
            for states, weight in self._batches():
                # By number, so that the split into batches does not matter.
                keys = _fold_in(key, np.arange(seen, seen + weight.size))
                chosen = {tap.site: self._chosen(tap, keys) for tap in uses}
                sums = step(sums, self._original, leaves, states, left, weight, chosen)
                seen += int(np.sum(weight))
            blocks = {t.path: jax.device_get(sums[t.path]) for t in uses if t.parts > 1}
            return {
                tap.name: _block(blocks.get(tap.path, sums[tap.path]), tap)
                for tap in taps
            }

        return measure

    def _chosen(self, tap: Tap, keys: jax.Array) -> jax.Array:
        """The positions at which a tap is measured, for each example's key."""
        keys = _fold_in_each(keys, self._number[tap.site])
        return example_positions(keys, self._map(tap), self._positions)

    def _map(self, tap: Tap) -> tuple[int, ...]:
        return output_map(tap, self._program.steps[self._number[tap.site]].eqn)

    def _row_bytes(self, taps: Sequence[Tap]) -> int:
        """What X and Y of all taps take for one batch."""
        images = self._calibration.size
        most = self._positions or sys.maxsize
        return 4 * images * sum(
            min(math.prod(self._map(tap)), most) * tap.parts * (tap.rows + tap.outputs)
            for tap in taps
        )  # fmt: skip

    def observe(
        self,
        place: Place,
        current: Any,
        state: Any,
        update: Callable[[Any, jax.Array], Any],
        *,
        plan: Plan | None = None,
        limit: int | None = None,
    ) -> Any:
        """The state after one pass over the activations of a group, as `stream` does.

        Args:
          place: at or behind the step that `advance` has reached.
          current, plan: those of `advance`.
          update: (state, activations (B, ..., C)) -> state, traceable.
          limit: stop after so many examples.
        """
        at = self._number[place.site]

        def step(state, variables, slots, left, have):
            found: list[jax.Array] = []

            def after(number, operands, results):
                if number == at:
                    found.append(channels_last(operands, results, place)[:have])

            self._run(variables, slots, at + 1, after, left)
            return update(state, found[0])

        run = jax.jit(step, static_argnums=4)
        leaves, seen = jax.tree.leaves(current), 0
        left = self._reductions.left(plan)
        for states, weight in self._batches():
            have = int(np.sum(weight))
            if limit is not None:
                have = min(have, limit - seen)
            if have <= 0:
                break
            state = run(state, leaves, states[1], left, have)
            seen += have
        return state

    def _rows(self, taps: Sequence[Tap]):
        """Program: the rows X, Y (B, P, parts, ...) of each tap, by its site."""
        sums = {
            t.site: self._shortcuts[t.site] for t in taps if t.site in self._shortcuts
        }
        seen = {*(tap.site for tap in taps), *captured_sites(sums)}
        stop = max(self._number[site] for site in seen) + 1
        wanted = {self._number[site]: site for site in seen | {*self._given}}

        def capture(
            variables, state, left, given
        ) -> tuple[dict[Site, Any], dict[Site, Any]]:
            read: dict[Site, Any] = {}
            made: dict[Site, Any] = {}

            def after(number, operands, results):
                if number in wanted:
                    read[wanted[number]], made[wanted[number]] = operands, results[0]
                    return given.get(wanted[number])

            self._run(variables, state, stop, after, left)
            return read, made

        def rows(original, current, states, left, chosen):
            first, targets = capture(original, states[0], None, {})
            given = {site: [targets[site]] for site in self._given if site in targets}
            second, _ = capture(current, states[1], left, given)
            result = {}
            for tap in taps:
                number, target = self._number[tap.site], targets[tap.site]
                if tap.site in sums:
                    target = from_operands(sums[tap.site], target, first, second)
                result[tap.site] = rows_and_targets(
                    tap,
                    self._program.steps[number].eqn,
                    second[tap.site][tap.image],
                    target,
                    chosen[tap.site],
                )
            return result

        return rows


# Programs of their own, for what they take to compile: one for all taps, or for all of
# a shape, where the rows' program is another for each group.
_fold_in = jax.jit(jax.vmap(jax.random.fold_in, (None, 0)))
_fold_in_each = jax.jit(jax.vmap(jax.random.fold_in, (0, None)))


@partial(jax.jit, donate_argnums=0)
def _update(moments: Moments, x: jax.Array, y: jax.Array, weight: jax.Array) -> Moments:
    """x, y (B, P, 1, ...) added, with the weight of each example (B,)."""
    weights = jnp.broadcast_to(weight[:, None], x.shape[:2]).reshape(-1)
    x, y = (a.reshape(-1, a.shape[-1]) for a in (x, y))
    return moments_lib.update(moments, x, y, weights)


@partial(jax.jit, donate_argnums=0)
def _update_blocks(moments: Moments, x: jax.Array, y: jax.Array, weight: jax.Array):
    """As `_update` for x, y (B, P, parts, ...) and moments with a leading axis."""
    every = jax.vmap(_update, (0, 2, 2, None))
    return every(moments, x[:, :, :, None], y[:, :, :, None], weight)


def _zeros(tap: Tap, second: bool) -> Moments:
    """Of no sample; with a leading axis if the kernel has several blocks."""
    zeros = moments_lib.zeros(tap.rows, tap.outputs, second=second)
    if tap.parts == 1:
        return zeros
    return jax.tree.map(lambda a: jnp.zeros((tap.parts, *a.shape), a.dtype), zeros)


def _block(moments: Moments, tap: Tap) -> Moments:
    if tap.parts == 1:
        return moments
    return jax.tree.map(lambda a: a[tap.part], moments)


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
    """{tap's name: moments} of all taps in one pass over the calibration batches."""
    relay = Relay(graph, original, calibration, positions=positions)
    return relay.moments(taps, current, seed=seed)

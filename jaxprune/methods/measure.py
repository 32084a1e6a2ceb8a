"""Calibration batches, and gradients of gates on them.

Everything runs the traced program with static shapes under jit, so that a change of
masks or weights compiles nothing anew; a last, smaller batch is padded and weighed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxprune.errors import DataError, ScoreError, first_line
from jaxprune.graph import ChannelGraph, Site, evaluate, tree_arguments
from jaxprune.methods.batches import (
    check_numbers,
    cut,
    iterable_of,
    label_range,
    read_all,
)
from jaxprune.methods.taps import Tap
from jaxprune.records import Group

LossFn = Callable[[Any, Any], jax.Array]


@contextmanager
def differentiable() -> Iterator[None]:
    """Says what to do where JAX takes no gradients through a model.

    Raises:
      ScoreError: a loop whose length the data decide, a check of checkify ...
    """
    try:
        yield
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ScoreError(
            "the gradients of the loss are needed, and JAX does not take them through "
            f"this model: {type(error).__name__}: {first_line(error)}; choose by "
            "weights or activations (method='l2', 'activation_mean', 'lasso', "
            "'importance_redundancy'), or cpli with mu=0, feature_importance=False"
        ) from error


def cross_entropy(outputs: Any, y: Any) -> jax.Array:
    """Per-example softmax cross-entropy (B,) of logits (B, K) and integer y (B,)."""
    return optax.softmax_cross_entropy_with_integer_labels(
        outputs.astype(jnp.float32), y
    )


class Calibration:
    """Batches of one static shape, to be run over as often as a method needs.

    Args:
      batches: iterable of (x, y), or of x alone; x an array or a tuple of inputs, y a
        tree of arrays. All are read once here and checked; what hands out one iterator
        only is kept in memory.

    Attributes:
      inputs, labels: of the first batch; labels None without.
      size: examples in each batch that is yielded, those of the first.
      label_range: least and largest label where labels are one array of integers.

    Raises:
      DataError: no batch, or one of another form, or of another than the first.
    """

    def __init__(self, batches: Any):
        self._batches = iterable_of(batches)
        self._sizes: list[int] = []
        first, ranges = None, []
        for number, batch in enumerate(read_all(self._batches)):
            check_numbers(batch, number)
            first = first or batch
            self._sizes.append(batch.size)
            ranges += label_range(batch.labels)
        if first is None:
            raise DataError(
                "the calibration batches are empty; pass an iterable of (x, y)"
            )
        if not first.size:
            raise DataError("the first calibration batch has no example")
        self._first, self.size = first, first.size
        self.inputs, self.labels = first.inputs, first.labels
        self.label_range = (min(ranges), max(ranges)) if ranges else None

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], Any, np.ndarray]]:
        """Yields (inputs, y, weight (B,)): 0 for padding, 1 for examples."""
        sizes = iter(self._sizes)
        for batch in read_all(self._batches, self._first):
            self._same(next(sizes, None), batch.size)
            for part in cut(batch, self.size):
                yield _place(part)
        self._same(next(sizes, None), None)

    @staticmethod
    def _same(first: int | None, now: int | None) -> None:
        """Nothing, if a batch has as many examples as in the first pass."""
        if first != now:
            shown = [
                f"{n} examples" if n is not None else "no batch" for n in (first, now)
            ]
            raise DataError(
                "the calibration batches are run over several times and must be the "
                f"same each time: expected {shown[0]} as in the first pass, found "
                f"{shown[1]}; pass a list"
            )

    @property
    def count(self) -> int:
        """How many batches it yields."""
        return sum(-(-size // self.size) for size in self._sizes)


def _place(tree: Any) -> Any:
    """The arrays spread over all devices along the batch, where it divides."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return tree
    # Not jax.make_mesh: its axes may be explicit, for which programs must be written.
    mesh = Mesh(np.asarray(devices), ("batch",))

    def put(array: Any) -> Any:
        divides = array.shape and array.shape[0] % len(devices) == 0
        spec = PartitionSpec("batch") if divides else PartitionSpec()
        return jax.device_put(array, NamedSharding(mesh, spec))

    return jax.tree.map(put, tree)


# Gates --------------------------------------------------------------------------


def gate_gradients(
    graph: ChannelGraph,
    taps: Sequence[Tap],
    variables: Any,
    calibration: Calibration,
    loss_fn: LossFn,
) -> dict[str, np.ndarray]:
    """{group name: (3, C)}: mean, mean absolute and mean square of dL/db per example.

    b_c multiplies channel c wherever a tap reads it. One backward pass gives the
    gradients of every example and group at once: each example has its own gates.
    Groups that no tap reads are left out.

    Args:
      loss_fn: one that `losses.check_loss` lets pass.

    Raises:
      ScoreError: no gradients through this model, or gradients that are no numbers.
    """
    readers = gate_readers(graph, taps)
    if not readers:
        return {}
    sizes = {group.name: group.size for group in graph.groups}
    names = sorted({name for uses in readers.values() for name, _ in uses})
    taps_at = {tap.site: tap for tap in taps}
    tree = jax.tree_util.tree_structure(
        jax.eval_shape(lambda v, i: graph.handle(v, *i), variables, graph.inputs)
    )

    def losses(gates, variables, inputs, y, weight):
        def before(site, eqn, operands):
            del eqn
            if site not in readers:
                return operands
            operands = list(operands)
            image, layout = taps_at[site].image, taps_at[site].layout
            assert layout.axis is not None
            for name, (axis, index) in readers[site]:
                open_ = jnp.ones((gates[name].shape[0], 1), gates[name].dtype)
                gate = jnp.concatenate([gates[name], open_], 1)[:, index]
                gate = layout.last(gate)  # (rows of the examples' axis, channels')
                shape = [1] * operands[image].ndim
                shape[layout.axis], shape[axis] = gate.shape
                gate = gate.T if axis < layout.axis else gate
                operands[image] = operands[image] * gate.reshape(shape).astype(
                    operands[image].dtype
                )
            return operands

        flat = evaluate(graph.closed, tree_arguments(variables, inputs), before=before)
        outputs = jax.tree_util.tree_unflatten(tree, flat)
        return (loss_fn(outputs, y) * weight).sum()

    @jax.jit
    def step(sums, variables, inputs, y, weight):
        gates = {n: jnp.ones((calibration.size, sizes[n])) for n in names}
        grads = jax.grad(losses)(gates, variables, inputs, y, weight)
        return {
            n: sums[n] + jnp.stack([g.sum(0), jnp.abs(g).sum(0), (g * g).sum(0)])
            for n, g in grads.items()
        }

    sums = {n: jnp.zeros((3, sizes[n])) for n in names}
    count = 0.0
    for inputs, y, weight in calibration:
        with differentiable():
            sums = step(sums, variables, inputs, y, weight)
        count += float(np.sum(weight))
    found = {n: np.asarray(s, np.float64) / count for n, s in sums.items()}
    check_finite(found)
    return found


def check_finite(of_groups: Mapping[str, np.ndarray]) -> None:
    """Nothing, where what gradients gave is finite: arrays (..., C) by group name.

    Raises:
      ScoreError: one is not.
    """
    wrong = {n: ~np.isfinite(np.atleast_2d(a)).all(0) for n, a in of_groups.items()}
    lines = [
        f"{n}: {int(bad.sum())} of {bad.size} channels"
        for n, bad in wrong.items()
        if bad.any()
    ]
    if lines:
        raise ScoreError(
            "the loss has gradients that are NaN or infinite on the calibration data "
            f"({lines[0]}; {len(lines)} of {len(of_groups)} groups): a square root or norm "
            "of zeros has none, for example, and jax.debug_nans tells where; to do "
            "without gradients, set mu=0 and feature_importance=False"
        )


def gate_readers(
    graph: ChannelGraph, taps: Sequence[Tap]
) -> dict[Site, list[tuple[str, tuple[int, np.ndarray]]]]:
    """{site: [(group, (axis of the image, channel of each index or -1))]}.

    -1 picks the appended gate that is always open.
    """
    found: dict[Site, list[tuple[str, tuple[int, np.ndarray]]]] = {}
    by_unit = np.full(graph.channels.count + 1, -1)
    for number, group in enumerate(graph.groups):
        by_unit[group.units] = number
    for tap in {tap.site: tap for tap in taps}.values():  # blocks read one image
        value = graph.records[tap.site].inputs[tap.image]
        if tap.layout.axis is None:
            continue  # one array for all examples: no gate for each
        for axis, nodes in enumerate(value.axes):
            if nodes is None or not reads(
                graph, tap, axis
            ):  # of which none is the batch
                continue
            needs = graph.needs(nodes)
            for number in sorted(set(by_unit[needs[needs >= 0]].tolist()) - {-1}):
                group = graph.groups[number]
                if not np.isin(tap.row_needs, group.units).any():
                    continue  # a whole block of a grouped convolution, read behind it
                index = channel_index(needs, group)
                found.setdefault(tap.site, []).append((group.name, (axis, index)))
    return found


def reads(graph: ChannelGraph, tap: Tap, axis: int) -> bool:
    """True if the tap contracts that axis of its image."""
    eqn = graph.records[tap.site].eqn
    if eqn.primitive.name == "dot_general":
        return axis in eqn.params["dimension_numbers"][0][tap.image]
    return axis == eqn.params["dimension_numbers"].lhs_spec[1]


def channel_index(needs: np.ndarray, group: Group) -> np.ndarray:
    """int array (n,): the group's channel of each index, -1 for none."""
    place = np.full(max(needs.max(initial=-1), group.units.max()) + 2, -1)
    place[group.units] = np.arange(group.size)
    return place[needs].max(1)

"""Calibration batches, and gradients of gates on them.

Everything runs the traced program with static shapes under jit, so that a change of
masks or weights compiles nothing anew; a last, smaller batch is padded and weighed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

from jaxprune.errors import DataError, ScoreError
from jaxprune.graph import ChannelGraph, Site, evaluate, tree_arguments
from jaxprune.methods.taps import Tap
from jaxprune.records import Group

LossFn = Callable[[Any, Any], jax.Array]


def cross_entropy(outputs: Any, y: Any) -> jax.Array:
    """Per-example softmax cross-entropy (B,) of logits (B, K) and integer y (B,)."""
    return optax.softmax_cross_entropy_with_integer_labels(
        outputs.astype(jnp.float32), y
    )


class Calibration:
    """Batches of one static shape, to be run over as often as a method needs.

    Args:
      batches: iterable of (x, y), or of x alone; x an array or a tuple of inputs. A
        one-shot iterator is read once into memory.

    Raises:
      DataError: no batch, or an element that is neither.
    """

    def __init__(self, batches: Iterable[Any]):
        if isinstance(batches, Iterator):
            batches = list(batches)
        self._batches = batches
        first = next(iter(batches), None)
        if first is None:
            raise DataError(
                "the calibration batches are empty; pass an iterable of (x, y)"
            )
        self.inputs, self.labels = split_batch(first)
        self.size = jax.tree.leaves(self.inputs)[0].shape[0]
        if self.size < 1:
            raise DataError("the first calibration batch has no example")

    def __iter__(self) -> Iterator[tuple[tuple[Any, ...], Any, np.ndarray]]:
        """Yields (inputs, y, weight (B,)): 0 for padding, 1 for examples."""
        for batch in self._batches:
            inputs, y = split_batch(batch)
            count = jax.tree.leaves(inputs)[0].shape[0]
            for start in range(0, count, self.size):
                part = slice(start, start + self.size)
                cut = jax.tree.map(lambda a, part=part: a[part], (inputs, y))
                have = min(self.size, count - start)
                weight = np.zeros(self.size, np.float32)
                weight[:have] = 1
                cut = jax.tree.map(lambda a, n=have: _pad(a, self.size - n), cut)
                yield (*_place(cut), _place(weight))

    @property
    def count(self) -> int:
        """How many batches it yields."""
        sizes = [jax.tree.leaves(split_batch(b)[0])[0].shape[0] for b in self._batches]
        return sum(-(-size // self.size) for size in sizes)


def split_batch(batch: Any) -> tuple[tuple[Any, ...], Any]:
    """The inputs as a tuple, and y or None."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        x, y = batch
    elif hasattr(batch, "shape"):
        x, y = batch, None
    else:
        raise DataError(
            "expected calibration batches of the form (x, y), found "
            f"{type(batch).__name__}; wrap several inputs as ((x1, x2), y)"
        )
    return (tuple(x) if isinstance(x, tuple | list) else (x,)), y


def _pad(array: Any, missing: int) -> Any:
    if not missing:
        return array
    array = np.asarray(array)
    return np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])


def _place(tree: Any) -> Any:
    """The arrays spread over all devices along the batch, where it divides."""
    devices = jax.local_devices()
    if len(devices) == 1:
        return tree
    mesh = jax.make_mesh((len(devices),), ("batch",), devices=devices)

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

    Raises:
      ScoreError: no labels, or losses that are not per example.
    """
    readers = gate_readers(graph, taps)
    if not readers:
        return {}
    if calibration.labels is None:
        raise ScoreError(
            "the classification loss needs labels: pass batches of (x, y), or select "
            "by reconstruction alone with mu=0, feature_importance=False"
        )
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
            image = taps_at[site].image
            for name, (axis, index) in readers[site]:
                open_ = jnp.ones((gates[name].shape[0], 1), gates[name].dtype)
                gate = jnp.concatenate([gates[name], open_], 1)[:, index]
                shape = [1] * operands[image].ndim
                shape[0], shape[axis] = gate.shape
                operands[image] = operands[image] * gate.reshape(shape).astype(
                    operands[image].dtype
                )
            return operands

        flat = evaluate(graph.closed, tree_arguments(variables, inputs), before=before)
        outputs = jax.tree_util.tree_unflatten(tree, flat)
        found = loss_fn(outputs, y)
        if found.ndim != 1 or found.shape[0] != calibration.size:
            raise ScoreError(
                f"loss_fn must return one loss per example, shape "
                f"({calibration.size},); found {found.shape}"
            )
        return (found * weight).sum()

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
        sums = step(sums, variables, inputs, y, weight)
        count += float(np.sum(weight))
    return {n: np.asarray(s, np.float64) / count for n, s in sums.items()}


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
        if not value.axes or value.axes[0] is not None:
            continue  # the leading axis must be the batch
        for axis, nodes in enumerate(value.axes):
            if nodes is None or not reads(graph, tap, axis):
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

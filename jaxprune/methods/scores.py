"""score(): any criterion for every group, from weights, gradients or activations."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.checks import SEED, check_values
from jaxprune.criteria import criterion as find_criterion
from jaxprune.criteria import redundancy
from jaxprune.errors import ScoreError
from jaxprune.graph import ChannelGraph
from jaxprune.methods.activations import find_places, stream
from jaxprune.methods.losses import check_loss
from jaxprune.methods.measure import (
    Calibration,
    LossFn,
    check_finite,
    cross_entropy,
    differentiable,
)
from jaxprune.methods.taps import find_taps
from jaxprune.records import Group
from jaxprune.slicing import checked_leaves
from jaxprune.stats import activations as stats_lib

# Examples whose gradients of all parameters are in memory at once.
EXAMPLES_AT_ONCE = 8
OF_GRADIENTS = ("gradients", "example_gradients")
# Criteria of weights, one program for all groups of a graph: run operation by
# operation, each would be compiled for every shape.
_PROGRAMS: weakref.WeakKeyDictionary[ChannelGraph, dict[Any, Callable[..., Any]]] = (
    weakref.WeakKeyDictionary()
)


def score(
    graph: ChannelGraph,
    variables: Any,
    criterion: str = "taylor_examples",
    *,
    batches: Iterable[Any] | Calibration | None = None,
    loss_fn: LossFn | None = None,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """{group name: (C,) float64}, larger = keep.

    Args:
      graph: from `trace`.
      variables: arrays of the model.
      criterion: a name from `jaxprune.criteria.CRITERIA`.
      batches: iterable of (x, y); not needed for criteria of weights. Labels are
        needed for criteria of gradients only.
      loss_fn: (outputs, y) -> per-example losses (B,); by default softmax
        cross-entropy of integer labels.
      seed: for "random".

    Raises:
      ScoreError: unknown criterion, data that it needs is missing, or a loss that is
        none per example.
      DataError: batches of another form.
    """
    found = find_criterion(criterion)
    check_values({"seed": seed}, {"seed": SEED})
    leaves = checked_leaves(graph, variables)
    if found.needs == "weights":
        of_graph = _PROGRAMS.setdefault(graph, {})
        if found.fn not in of_graph:
            of_graph[found.fn] = jax.jit(_each(found.fn, graph.groups))
        return {n: _host(values) for n, values in of_graph[found.fn](leaves).items()}
    if found.needs == "key":
        keys = jax.random.split(jax.random.key(seed), max(len(graph.groups), 1))
        return {
            g.name: _host(found.fn(g, leaves, key=key))
            for g, key in zip(graph.groups, keys, strict=False)
        }
    if batches is None:
        raise ScoreError(
            f"criterion {criterion!r} needs calibration data: pass batches=, an "
            "iterable of (x, y) from the training split"
        )
    data = batches if isinstance(batches, Calibration) else Calibration(batches)
    graph = graph.retrace(data.inputs)
    if found.needs in OF_GRADIENTS:
        loss = cross_entropy if loss_fn is None else loss_fn
        check_loss(graph, variables, data, loss, user=f"criterion {criterion!r}")
        if found.needs == "gradients":
            return _batch_gradients(graph, variables, data, loss, found.fn)
        return _example_gradients(graph, variables, data, loss, found.fn, graph.groups)
    return _activations(graph, variables, data, found)


def _each(fn: Callable[..., Any], groups: Sequence[Group]) -> Callable[[Any], Any]:
    return lambda leaves: {group.name: fn(group, leaves) for group in groups}


def _host(values: Any) -> np.ndarray:
    return np.asarray(values, np.float64)


def loss_scores(
    graph: ChannelGraph,
    variables: Any,
    data: Calibration,
    loss_fn: LossFn,
    groups: Sequence[Group],
) -> dict[str, np.ndarray]:
    """{group name: (C,)} by `taylor_examples` of these groups; none where the model does
    not run on one example.

    Args:
      graph: traced with inputs of the data's batch shape.
    """
    inputs, y, _ = next(iter(data))
    params = _parameters(graph, variables)
    try:
        jax.eval_shape(
            _example_loss(graph, loss_fn), params, variables, *_first(inputs, y)
        )
    except Exception:  # noqa: BLE001  (the user's source may raise any)
        return {}
    fn = find_criterion("taylor_examples").fn
    found = _example_gradients(graph, variables, data, loss_fn, fn, groups)
    check_finite(found)
    return found


def _first(*trees_: Any) -> Any:
    return jax.tree.map(lambda a: a[0], trees_)


def _parameters(graph: ChannelGraph, variables: Any) -> dict[str, Any]:
    leaves = trees.flatten(variables)
    return {
        path: leaf
        for path, leaf in leaves.items()
        if graph.handle.is_parameter(path) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    }


def _batch_gradients(graph, variables, data: Calibration, loss_fn, fn):
    params = _parameters(graph, variables)

    def mean(params, variables, inputs, y, weight):
        outputs = graph.handle(trees.replace(variables, params), *inputs)
        return (loss_fn(outputs, y) * weight).sum() / weight.sum()

    @jax.jit
    def step(sums, params, variables, inputs, y, weight):
        # Of the mean: in float16 the gradient of a sum overflows.
        grads = jax.grad(mean)(params, variables, inputs, y, weight)
        return {
            path: sums[path] + g.astype(sums[path].dtype) * weight.sum()
            for path, g in grads.items()
        }

    sums = {
        path: jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
        for path, leaf in params.items()
    }
    count = 0.0
    for inputs, y, weight in data:
        with differentiable():
            sums = step(sums, params, variables, inputs, y, weight)
        count += float(np.sum(weight))
    grads = {path: total / count for path, total in sums.items()}
    leaves = trees.flatten(variables)
    return {g.name: _host(fn(g, leaves, grads)) for g in graph.groups}


def _example_loss(graph: ChannelGraph, loss_fn: LossFn) -> Callable[..., jax.Array]:
    def one(params, variables, inputs, y):
        batch = jax.tree.map(lambda a: a[None], inputs)
        outputs = graph.handle(trees.replace(variables, params), *batch)
        return loss_fn(outputs, jax.tree.map(lambda a: a[None], y))[0]

    return one


def _example_gradients(
    graph, variables, data: Calibration, loss_fn, fn, groups: Sequence[Group]
):
    used = {slot.path for group in groups for slot in group.slots}
    params = _parameters(graph, variables)
    params = {path: leaf for path, leaf in params.items() if path in used}
    one = _example_loss(graph, loss_fn)
    each = jax.vmap(jax.grad(one), in_axes=(None, None, 0, 0))

    @jax.jit
    def step(params, variables, inputs, y):
        grads = each(params, variables, inputs, y)
        leaves = trees.flatten(variables)
        size = jax.tree.leaves(y)[0].shape[0]
        return {g.name: fn(g, leaves, grads) * size for g in groups}

    sums = {g.name: np.zeros(g.size) for g in groups}
    count = 0
    for inputs, y, weight in data:
        have = int(np.sum(weight))
        for start in range(0, have, EXAMPLES_AT_ONCE):
            part = slice(start, min(start + EXAMPLES_AT_ONCE, have))
            few = jax.tree.map(lambda a, part=part: a[part], (inputs, y))
            with differentiable():
                found = step(params, variables, *few)
            for name, values in found.items():
                sums[name] += _host(values)
        count += have
    return {name: total / count for name, total in sums.items()}


def _activations(graph, variables, data: Calibration, found):
    taps = find_taps(graph)
    places = find_places(graph, graph.groups, taps)
    missing = [g.name for g in graph.groups if g.name not in places]
    if missing:
        layers = sorted({name.partition(".")[0] for name in missing})
        raise ScoreError(
            f"groups {missing[:4]} have no activations of their own (their channels "
            "are summed away inside a product); take a criterion of weights, such as "
            f"'l2', or keep them whole: ignore={[f'*{name}*' for name in layers]}"
        )
    sizes = {g.name: g.size for g in graph.groups}

    def run(states, update, **options):
        return stream(graph, variables, data, places, states, update, **options)

    if found.needs == "maps":
        # Nuclear norms are not sums over examples of a state; they average.
        start = {n: (jnp.zeros(s), jnp.zeros(())) for n, s in sizes.items()}

        def add(state, maps):
            flat = maps.reshape(maps.shape[0], -1, maps.shape[-1])
            return state[0] + found.fn(flat) * len(flat), state[1] + len(flat)

        return {n: _host(t / c) for n, (t, c) in run(start, add).items()}
    if found.needs == "comoments":
        start = {n: stats_lib.comoments_zeros(s) for n, s in sizes.items()}
        states = run(start, stats_lib.comoments_update)
        return {n: _host(found.fn(state)) for n, state in states.items()}
    start = {n: stats_lib.stats_zeros(s) for n, s in sizes.items()}
    pooled = found.needs == "histogram"
    states = run(start, stats_lib.stats_update, pooled=pooled)
    if found.needs == "histogram":
        empty = {
            n: stats_lib.histogram_zeros(redundancy.shared_edges(s.mean, s.variance))
            for n, s in states.items()
        }
        states = run(empty, stats_lib.histogram_update, pooled=True)
    return {n: _host(found.fn(state)) for n, state in states.items()}

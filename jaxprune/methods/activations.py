"""Where a group's activations are, and statistics of them over calibration batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxprune.graph import ChannelGraph, Record, Site, evaluate, tree_arguments
from jaxprune.graph.evaluate import CALLS, Stop, sub_jaxprs
from jaxprune.graph.examples import Layout, layouts
from jaxprune.graph.interpret import Value
from jaxprune.graph.rules.elementwise import ELEMENTWISE
from jaxprune.methods.measure import Calibration, channel_index
from jaxprune.methods.taps import Tap
from jaxprune.records import Group


@dataclass(frozen=True, eq=False)
class Place:
    """An array of the program that holds a group's activations.

    Attributes:
      site: the equation; its result `output`, or its operand `operand` if not None.
      axis: the channels' axis.
      index: int (C, m), the indices of each channel on it.
      layout: where the examples lie in the array.
      conv: True if the group's producer is a convolution.
    """

    site: Site
    output: int
    operand: int | None
    axis: int
    index: np.ndarray
    layout: Layout
    conv: bool


def find_places(
    graph: ChannelGraph, groups: Sequence[Group], taps: Sequence[Tap]
) -> dict[str, Place]:
    """{group: place}: the output of the layer that makes the channels, activated.

    From the one producing contraction through bias, normalisation and activation
    function, up to the first operation that is not element-wise. Groups with several
    producers (residual streams) are seen where their first reader reads them. Groups
    that neither finds are left out.
    """
    found = {}
    producers = _producers(graph)
    for group in groups:
        makers = producers.get(group.name, [])
        place = _produced(graph, group, makers[0]) if len(makers) == 1 else None
        place = place or _read(graph, group, taps, makers)
        if place is not None:
            found[group.name] = place
    return found


def _producers(graph: ChannelGraph) -> dict[str, list[Record]]:
    made: dict[tuple[str, int], list[str]] = {}
    for group in graph.groups:
        for slot in group.producers:
            made.setdefault((slot.path, slot.axis), []).append(group.name)
    found: dict[str, list[Record]] = {}
    for record in graph.records.values():
        if record.name not in ("dot_general", "conv_general_dilated"):
            continue
        for value in record.inputs:
            for axis in range(len(value.axes)) if value.leaf else ():
                for name in made.get((value.leaf or "", axis), ()):
                    found.setdefault(name, []).append(record)
    return found


def _read(graph, group, taps: Sequence[Tap], makers) -> Place | None:
    conv = any(record.name == "conv_general_dilated" for record in makers)
    for tap in taps:
        value = graph.records[tap.site].inputs[tap.image]
        spot = _spot(graph, group, value)
        if np.isin(tap.row_needs, group.units).any() and spot is not None:
            return Place(tap.site, 0, tap.image, *spot, tap.layout, conv)
    return None


def _produced(graph: ChannelGraph, group: Group, record: Record) -> Place | None:
    site, output = _activated(graph, record)
    value = graph.records[site].outputs[output]
    spot = _spot(graph, group, value)
    layout = layouts(graph).results.get(site, {output: None})[output]
    if spot is None or layout is None or layout.axis == spot[0]:
        return None
    conv = record.name == "conv_general_dilated"
    return Place(site, output, None, *spot, layout, conv)


def _spot(graph, group: Group, value: Value) -> tuple[int, np.ndarray] | None:
    """The axis of the value that holds the group's channels, and their indices."""
    for axis, nodes in enumerate(value.axes):
        if nodes is None:
            continue
        channel = channel_index(graph.needs(nodes), group)
        counts = np.bincount(channel[channel >= 0], minlength=group.size)
        if counts.size and (counts == counts[0]).all() and counts[0]:
            order = np.argsort(channel, kind="stable")[(channel < 0).sum() :]
            return axis, order.reshape(group.size, -1)
    return None


def _activated(graph: ChannelGraph, record: Record) -> tuple[Site, int]:
    """Site and result of the last element-wise operation behind a contraction."""
    jaxpr = graph.closed.jaxpr
    for number in record.site[:-1]:
        jaxpr = sub_jaxprs(jaxpr.eqns[number])[0].jaxpr
    prefix, start = record.site[:-1], record.site[-1]
    mine = {jaxpr.eqns[start].outvars[0]}
    last = (record.site, 0)
    for number in range(start + 1, len(jaxpr.eqns)):
        eqn = jaxpr.eqns[number]
        operands = [v for v in eqn.invars if not isinstance(v, jex.Literal)]
        if not any(v in mine for v in operands):
            continue
        values = graph.records[(*prefix, number)].inputs
        alone = all(
            value.pure or isinstance(v, jex.Literal) or v in mine
            for v, value in zip(eqn.invars, values, strict=True)
        )
        name = eqn.primitive.name
        same = eqn.outvars[0].aval.shape == jaxpr.eqns[start].outvars[0].aval.shape
        if not (alone and same and (name in ELEMENTWISE or name in CALLS)):
            break
        mine.add(eqn.outvars[0])
        last = _innermost(eqn, (*prefix, number), 0)
    return last


def _innermost(eqn: jex.JaxprEqn, site: Site, output: int) -> tuple[Site, int]:
    """The equation inside a call that makes its result."""
    if eqn.primitive.name not in CALLS:
        return site, output
    jaxpr = sub_jaxprs(eqn)[0].jaxpr
    wanted = jaxpr.outvars[output]
    for number, inner in enumerate(jaxpr.eqns):
        if wanted in inner.outvars:
            place = list(inner.outvars).index(wanted)
            return _innermost(inner, (*site, number), place)
    raise AssertionError("a call that returns its own operand is not element-wise")


def capture_places(
    graph: ChannelGraph,
    variables: Any,
    inputs: Sequence[Any],
    places: Mapping[str, Place],
) -> dict[str, jax.Array]:
    """{group: activations (B, ..., C)}, one run of the program as far as needed."""
    by_site: dict[Site, list[str]] = {}
    for name, place in places.items():
        by_site.setdefault(place.site, []).append(name)
    found: dict[str, jax.Array] = {}

    def after(site, eqn, operands, results):
        del eqn
        for name in by_site.get(site, ()):
            place = places[name]
            found[name] = channels_last(operands, results, place)
            if len(found) == len(places):
                raise Stop
        return results

    try:
        evaluate(graph.closed, tree_arguments(variables, inputs), after=after)
    except Stop:
        pass
    return found


def channels_last(
    operands: Sequence[jax.Array], results: Sequence[jax.Array], place: Place
) -> jax.Array:
    """Activations (B, ..., copies, C) from the equation at `place.site`; of complex
    ones the magnitudes."""
    array = results[place.output]
    if place.operand is not None:
        array = operands[place.operand]
    if jnp.iscomplexobj(array):
        array = jnp.abs(array)
    channels, copies = place.index.shape
    array = jnp.take(array, place.index.T.reshape(-1), axis=place.axis)
    others = [axis for axis in range(array.ndim) if axis != place.axis]
    array = jnp.moveaxis(array, place.axis, -1)
    array = place.layout.moved((*others, place.axis)).first(array)
    return array.reshape(*array.shape[:-1], copies, channels)


def stream(
    graph: ChannelGraph,
    variables: Any,
    calibration: Calibration,
    places: Mapping[str, Place],
    states: Mapping[str, Any],
    update: Callable[[Any, jax.Array], Any],
    *,
    pooled: bool = False,
    limit: int | None = None,
) -> dict[str, Any]:
    """The states of all groups after one pass over the calibration batches.

    Args:
      states: {group: initial state}.
      update: (state, activations (..., C)) -> state, traceable.
      pooled: average over everything but examples and channels first.
      limit: stop after so many examples.
    """

    def step(states, variables, inputs, have):
        arrays = capture_places(graph, variables, inputs, places)
        result = {}
        for name, array in arrays.items():
            part = array[:have]
            if pooled:
                part = part.mean(tuple(range(1, part.ndim - 1)))
            result[name] = update(states[name], part)
        return result

    run = jax.jit(step, static_argnums=3)
    seen, found = 0, dict(states)
    for inputs, _, weight in calibration:
        have = int(np.sum(weight))
        if limit is not None:
            have = min(have, limit - seen)
        if have <= 0:
            break
        found = run(found, variables, inputs, have)
        seen += have
    return found

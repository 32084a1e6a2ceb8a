"""The proof: the slim model against the original with removed channels silenced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import checkify
from jax.extend import core as jex

from jaxprune import trees
from jaxprune.alignment import axis_mask, kept_shape
from jaxprune.check import align, doubtful_divisors
from jaxprune.errors import EmissionError, GraphError
from jaxprune.frameworks.program import shape_of
from jaxprune.frameworks.replay import size_literals
from jaxprune.graph import ChannelGraph, Site, evaluate, tree_arguments
from jaxprune.graph.evaluate import bind
from jaxprune.graph.interpret import CHECK
from jaxprune.graph.reductions import NEUTRAL, silence
from jaxprune.records import Plan
from jaxprune.surgery import shrunk

# Where both programs round alike but sum in another order, an error of a few units in
# the last place remains: of float32 after many layers, or of a coarser type.
_TOLERANCE, _ROUNDINGS = 1e-4, 4
# Larger errors than this no rounding excuses.
_DOUBTFUL = 0.03


def masked_outputs(
    graph: ChannelGraph,
    plan: Plan | Mapping[str, Any],
    variables: Any,
    inputs: Any,
    *,
    replay: bool | None = None,
) -> list[jax.Array]:
    """Flat outputs of the ORIGINAL program with removed channels silenced throughout.

    The original jaxpr runs at full size; after every equation the removed indices of
    its results are set to zero (to the neutral element before a maximum, minimum or
    product). Means, so also normalisations, run over kept channels only: they count the
    terms that are left. All other numbers in the program are the original's.
    """
    plan = graph.complete(plan)
    replay = graph.replay if replay is None else replay
    graph = graph.retrace(inputs)
    mask = graph.unit_mask(plan)
    if replay:
        own, _ = doubtful_divisors(graph, plan)
        literals = size_literals(graph, plan, inputs, own)
    else:
        literals = align(graph, plan).means

    def silenced(array: Any, axes: Any, value: Any = 0) -> Any:
        for dim, axis in enumerate(axes):
            if axis is not None:
                kept = axis_mask(graph, mask, axis)
                array = array if kept.all() else silence(array, dim, kept, value)
        return array

    def before(site: Site, eqn: jex.JaxprEqn, operands: list[Any]) -> list[Any]:
        neutral = NEUTRAL.get(eqn.primitive.name)
        if neutral is not None:
            axes = graph.records[site].inputs[0].axes
            operands = [silenced(operands[0], axes, neutral), *operands[1:]]
        return operands

    def after(site: Site, eqn: Any, operands: Any, results: list[Any]) -> list[Any]:
        del eqn, operands
        values = graph.records[site].outputs
        return [silenced(r, v.axes) for r, v in zip(results, values, strict=True)]

    def execute(site: Site, eqn: jex.JaxprEqn, operands: list[Any]) -> list[Any]:
        noise = eqn.primitive.name == "random_bits"
        if not noise or graph.records[site].inputs[0].pure:
            return bind(eqn, operands, _precise(eqn))
        # The slim program draws its noise at its own size: the same draw, spread out.
        axes = graph.records[site].outputs[0].axes
        full = shape_of(eqn.outvars[0])
        # `shape` is what each key draws; the keys' own axes come first.
        shape = kept_shape(graph, mask, axes, full)[len(operands[0].shape) :]
        drawn = bind(eqn, operands, {**eqn.params, "shape": shape})[0]
        kept = [
            np.arange(size)
            if axis is None
            else np.flatnonzero(axis_mask(graph, mask, axis))
            for axis, size in zip(axes, full, strict=True)
        ]
        return [jnp.zeros(full, drawn.dtype).at[np.ix_(*kept)].set(drawn)]

    def run(variables: Any, inputs: Any) -> list[Any]:
        arguments = tree_arguments(variables, inputs)
        values = list(graph.leaves.values())
        arguments = [
            silenced(a, values[k].axes) if k < len(values) else a
            for k, a in enumerate(arguments)
        ]
        return evaluate(
            graph.closed,
            arguments,
            before=before,
            after=after,
            execute=execute,
            loops=True,
            literals=literals,
        )

    return jax.jit(run)(variables, inputs)


def verify(
    graph: ChannelGraph,
    plan: Plan | Mapping[str, Any],
    x: Any,
    *,
    variables: Any = None,
    replay: bool | None = None,
    tolerance: float | None = None,
) -> float:
    """max |masked original - slim| over the outputs, on the inputs x.

    Outputs that `trace(outputs=...)` let shrink are compared where they are kept. Matrix
    products whose precision the source leaves open run at the highest, on every device.

    Args:
      graph: from `trace`, with real arrays (or pass `variables`).
      plan: what is kept.
      x: an input array, or a tuple of the model's inputs, of any batch size.
      variables: full-size arrays to prove the plan with; by default those traced.
      replay: as for `shrink`.
      tolerance: largest error allowed of each output, relative to the largest entry
        of it (at least 1); by default 1e-4, or four roundings of the coarsest type of
        number in the program if that is more (bfloat16: 0.03). Of a network that
        magnifies roundings (sines of large arguments), up to 0.03: four times what one
        rounding of the weights changes in the masked original.

    Raises:
      EmissionError: the two differ by more than the tolerance, or the original's
        outputs are NaN.
    """
    source = graph.variables if variables is None else variables
    inputs = x if isinstance(x, tuple) else (x,)
    abstract = [p for p, leaf in trees.flatten(source).items() if _is_shape(leaf)]
    if abstract:
        raise GraphError(
            f"the graph was traced without arrays: expected an array at {abstract[0]}, "
            "found its shape alone; pass verify(..., variables=arrays)"
        )
    replay = graph.replay if replay is None else replay
    slim = shrunk(graph, plan, source, replay=replay)
    whole, graph = graph.handle, graph.retrace(inputs)
    expected = masked_outputs(graph, slim.plan, source, inputs, replay=replay)
    call = slim.model
    if not replay:  # a replay's arrays may fit no module
        call = whole.rebuild(slim.variables, slim.report["settings"])
    with jax.default_matmul_precision("highest"):
        outputs = _run(graph, call, slim.variables, inputs)
    found = jax.tree.leaves(outputs)
    mask, worst, excess = graph.unit_mask(slim.plan), 0.0, (0.0, 0.0, 1.0)
    for value, full, small in zip(graph.results, expected, found, strict=True):
        a, b = _wide(full), _wide(small)
        for dim, axis in enumerate(value.axes):
            if axis is not None:
                a = np.compress(axis_mask(graph, mask, axis), a, dim)
        if a.size and np.isnan(a).all():
            raise EmissionError(
                "nothing can be proven: an output of the masked original is NaN "
                "throughout; check the weights and the inputs, or pass verify=False"
            )
        difference = _difference(a, b)
        scale = float(np.abs(a[np.isfinite(a)]).max(initial=1.0))
        worst = max(worst, difference)
        excess = max(excess, (difference / scale, difference, scale))
    relative, difference, scale = excess
    if tolerance is None:
        tolerance = max(_TOLERANCE, _ROUNDINGS * _coarsest(graph))
        if tolerance < relative <= _DOUBTFUL:
            moved = masked_outputs(
                graph, slim.plan, _rounded(source), inputs, replay=replay
            )
            tolerance = max(tolerance, _ROUNDINGS * _apart(expected, moved))
    if not relative <= tolerance:
        raise EmissionError(
            f"the slim model differs from the masked original by {difference:.3g} where "
            f"outputs reach {scale:.3g}; allowed is {tolerance:g} relative. Please keep "
            "this model and plan: they show a defect"
        )
    return worst


def _run(graph: ChannelGraph, call: Any, variables: Any, inputs: Any) -> Any:
    """The outputs of a call; JAX runs what asserts by checkify.check checkified only."""

    def run(variables: Any, inputs: Any) -> Any:
        return call(variables, *inputs)

    if any(record.name == CHECK for record in graph.records.values()):
        return jax.jit(checkify.checkify(run))(variables, inputs)[1]
    return jax.jit(run)(variables, inputs)


def _precise(eqn: jex.JaxprEqn) -> dict[str, Any]:
    """The equation's parameters, at the highest precision where it is left open."""
    product = eqn.primitive.name in ("dot_general", "conv_general_dilated")
    opened = product and eqn.params["precision"] is None
    # Of both operands, as JAX writes it into equations.
    highest = {"precision": (jax.lax.Precision.HIGHEST,) * 2} if opened else {}
    return {**eqn.params, **highest}


def _coarsest(graph: ChannelGraph) -> float:
    """The rounding error, relative, of the coarsest floats in the program."""
    types = {
        getattr(var.aval, "dtype", None)
        for record in graph.records.values()
        for var in record.eqn.outvars
    }
    floats = [t for t in types if t is not None and jnp.issubdtype(t, jnp.inexact)]
    return max((float(jnp.finfo(kind).eps) for kind in floats), default=0.0)


def _wide(array: Any) -> np.ndarray:
    """In float64, or complex128 if it is complex."""
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def _rounded(variables: Any) -> Any:
    """The variables with every float moved by up to one rounding of its type."""
    rng = np.random.default_rng(0)

    def moved(leaf: Any) -> Any:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        step = jnp.finfo(leaf.dtype).eps * rng.uniform(-1, 1, leaf.shape)
        return (jnp.asarray(leaf) * (1 + step)).astype(leaf.dtype)

    return jax.tree.map(moved, variables)


def _apart(outputs: list[Any], others: list[Any]) -> float:
    """The largest difference relative to the outputs (at least 1); 0 if it is none."""
    worst = 0.0
    for a, b in zip(map(_wide, outputs), map(_wide, others), strict=True):
        scale = float(np.abs(a[np.isfinite(a)]).max(initial=1.0))
        worst = max(worst, _difference(a, b) / scale)
    return worst if np.isfinite(worst) else 0.0


def _is_shape(leaf: Any) -> bool:
    return isinstance(leaf, jax.ShapeDtypeStruct)


def _difference(a: np.ndarray, b: np.ndarray) -> float:
    """max |a - b|; equal infinities agree, a NaN agrees with nothing but a NaN."""
    alike = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(alike, 0.0, np.abs(a - b))
    return float(np.nan_to_num(difference, nan=np.inf).max(initial=0.0))

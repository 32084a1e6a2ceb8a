"""Replay: the original program on sliced arrays, with the sizes in it rewritten.

For models whose source states a width, which no smaller module can follow. The jaxpr
of the original call is evaluated equation by equation; the sizes that equations carry
(shapes, slice bounds, tile counts, feature groups) become those of the plan. The
price: the result is a function; custom derivative rules are lost, because calls are
inlined; size constants other than the divisor of a mean stay those of the original,
which is what the masked network has. A division in the user's own source by the number
of the terms is a mean unless the source, at the smaller size, says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxprune.errors import EmissionError, first_line
from jaxprune.frameworks.program import (
    Constants,
    Program,
    constants,
    program_of,
    shape_of,
)
from jaxprune.graph import ChannelGraph, Record, Site, evaluate, tree_arguments
from jaxprune.graph.evaluate import bind
from jaxprune.graph.means import Divisor
from jaxprune.records import Plan
from jaxprune.slicing import slice_variables

_KEPT_PROGRAMS = 8


@dataclass(frozen=True, eq=False)
class Replayed:
    """A function (variables, *inputs) -> outputs of the sliced variables.

    It takes inputs of any shape that the original takes: the original is traced anew
    for each, and the last few programs are kept.

    Attributes:
      call: the original, a function (variables, *inputs).
      variables: shapes of the variables at full size.
      masks: {(path, axis): bool array (n,)}, what is kept of them.
      own: divisors that stay, though they are the number of terms.
    """

    call: Callable[..., Any]
    variables: Any
    masks: Mapping[tuple[str, int], np.ndarray]
    own: frozenset[Divisor] = frozenset()
    _programs: dict[Any, tuple[Program, Constants]] = field(default_factory=dict)

    def __call__(self, variables: Any, *inputs: Any) -> Any:
        program, replaced = self.program(inputs)

        def run(site: Site, eqn: jex.JaxprEqn, operands: list[Any]) -> list[Any]:
            record = program.records[site]
            table = record.name == "random_bits" and record.inputs[0].pure
            if record.name == "concatenate":  # others of it have no width to follow
                operands = [o for o in operands if 0 not in o.shape] or operands
            if record.name == "gather":
                operands = [operands[0], _renumbered(program, record, operands[1])]
            if record.name == "iota" or table:
                # Of what is left; resized, positions would be counted anew, and a
                # fixed key would draw another table.
                (whole,) = bind(eqn, operands) if table else [_iota(eqn)]
                results = [jnp.asarray(program.take(whole, record.outputs[0]))]
            else:
                results = bind(eqn, operands, resized(program, record))
            for result, value, var in zip(
                results, record.outputs, eqn.outvars, strict=True
            ):
                expected = program.shape(value, shape_of(var))
                if tuple(result.shape) != expected:
                    raise EmissionError(
                        f"replay of {record.name} gives shape {tuple(result.shape)} "
                        f"where the plan leaves {expected}; keep that group whole"
                    )
            return results

        arguments = tree_arguments(variables, inputs)
        flat = evaluate(
            program.closed,
            arguments,
            execute=run,
            loops=True,
            remat=True,
            literals=replaced,
        )
        return jax.tree.unflatten(program.output, flat)

    def program(self, inputs: tuple[Any, ...]) -> tuple[Program, Constants]:
        """The program for inputs of these shapes."""
        structs = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(np.shape(x), jax.dtypes.result_type(x)),
            inputs,
        )
        key = (tuple(jax.tree.leaves(structs)), jax.tree.structure(structs))
        if key not in self._programs:
            found = program_of(self.call, self.variables, structs, self.masks)
            while len(self._programs) >= _KEPT_PROGRAMS:
                self._programs.pop(next(iter(self._programs)))
            # Kept from a call within `jit` for the next: no tracer may be in it.
            with jax.ensure_compile_time_eval():
                self._programs[key] = (found, constants(found, self.own))
        return self._programs[key]


def replay(
    graph: ChannelGraph,
    plan: Plan | Mapping[str, Any],
    call: Callable[..., Any] | None = None,
    own: frozenset[Divisor] = frozenset(),
) -> Replayed:
    """A function (sliced variables, *inputs) -> outputs, at the widths of the plan.

    Args:
      graph: from `trace`.
      plan: what is kept.
      call: (variables, *inputs) -> outputs of the full-size model; another call than
        the one traced where given: one for training, with random keys among the
        inputs and new statistics among the outputs, say.
      own: see `jaxprune.check.doubtful_divisors`.
    """
    structs = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), graph.variables
    )
    return Replayed(call or graph.handle, structs, graph.place_masks(plan), own)


def check_replay(graph: ChannelGraph, plan: Plan | Mapping[str, Any]) -> None:
    """Nothing, if the replay of the plan works; costs no FLOPs.

    Raises:
      EmissionError: an equation's sizes cannot be rewritten, with the first one.
    """
    replayed = replay(graph, plan)
    small = slice_variables(graph, plan, replayed.variables)
    try:
        jax.eval_shape(replayed, small, *graph.inputs)
    except EmissionError:
        raise
    except Exception as error:
        raise EmissionError(
            f"the program cannot be replayed at these sizes: {first_line(error)}; keep "
            "that group whole"
        ) from error


def size_literals(
    graph: ChannelGraph,
    plan: Plan | Mapping[str, Any],
    inputs: tuple[Any, ...],
    own: frozenset[Divisor] = frozenset(),
) -> Constants:
    """By site, the literals of the original that a replay changes; None elsewhere."""
    _, replaced = replay(graph, plan, own=own).program(inputs)
    return {
        site: [new if new is not None and np.ndim(new) == 0 else None for new in row]
        for site, row in replaced.items()
    }


def resized(program: Program, record: Record) -> dict[str, Any]:
    """The equation's parameters with the sizes that the plan leaves."""
    eqn, params = record.eqn, dict(record.eqn.params)
    outputs = [
        program.shape(value, shape_of(var))
        for value, var in zip(record.outputs, eqn.outvars, strict=True)
    ]
    inputs = [
        program.shape(value, shape_of(atom))
        for value, atom in zip(record.inputs, eqn.invars, strict=True)
    ]
    rule = _RULES.get(record.name)
    if rule is not None:
        params.update(rule(program, record, inputs, outputs))
    return params


def _renumbered(program: Program, record: Record, indices: Any) -> Any:
    """Indices among what is left of the axis that a gather picks channels from."""
    numbers = record.eqn.params["dimension_numbers"]
    for column, dim in enumerate(numbers.start_index_map):
        axis = record.inputs[0].axes[dim]
        one = dim in numbers.collapsed_slice_dims
        if one and axis is not None and not program.kept(axis).all():
            new = np.cumsum(program.kept(axis)) - 1
            renumbered = jnp.asarray(new, indices.dtype)[indices[..., column]]
            indices = indices.at[..., column].set(renumbered)
    return indices


def _iota(eqn: jex.JaxprEqn) -> np.ndarray:
    shape, along = eqn.params["shape"], eqn.params["dimension"]
    column = [-1 if dim == along else 1 for dim in range(len(shape))]
    positions = np.arange(shape[along], dtype=eqn.params["dtype"]).reshape(column)
    return np.broadcast_to(positions, shape)


Shapes = list[tuple[int, ...]]


def _named(name: str) -> Callable[..., dict[str, Any]]:
    def rule(program: Program, record: Record, inputs: Shapes, outputs: Shapes):
        return {name: outputs[0]}

    return rule


def _slice(program: Program, record: Record, inputs: Shapes, outputs: Shapes):
    starts, limits = [], []
    params = record.eqn.params
    bounds = zip(
        record.inputs[0].axes,
        params["start_indices"],
        params["limit_indices"],
        params["strides"] or (1,) * len(params["start_indices"]),
        strict=True,
    )
    for axis, start, limit, stride in bounds:
        if axis is None:
            starts.append(start)
            limits.append(limit)
            continue
        kept = program.kept(axis)
        # With a stride the first of every pair stays the first.
        starts.append(int(kept[:start].sum()) if stride == 1 else start)
        limits.append(int(kept[:limit].sum()))
    return {"start_indices": tuple(starts), "limit_indices": tuple(limits)}


def _gather(program: Program, record: Record, inputs: Shapes, outputs: Shapes):
    full, sizes = shape_of(record.eqn.invars[0]), record.eqn.params["slice_sizes"]
    return {
        "slice_sizes": tuple(
            left if size == whole else size
            for size, whole, left in zip(sizes, full, inputs[0], strict=True)
        )
    }


def _split(program: Program, record: Record, inputs: Shapes, outputs: Shapes):
    along = record.eqn.params["axis"]
    return {"sizes": tuple(shape[along] for shape in outputs)}


def _tile(program: Program, record: Record, inputs: Shapes, outputs: Shapes):
    return {
        "reps": tuple(
            new // old if old else 1
            for new, old in zip(outputs[0], inputs[0], strict=True)
        )
    }


def _convolution(program: Program, record: Record, inputs: Shapes, outputs: Shapes):
    numbers = record.eqn.params["dimension_numbers"]
    channels = inputs[0][numbers.lhs_spec[1]]
    groups = channels // inputs[1][numbers.rhs_spec[1]]
    whole = record.eqn.params["feature_group_count"] == 1
    return {} if whole else {"feature_group_count": groups}


_RULES: dict[str, Callable[..., dict[str, Any]]] = {
    "broadcast_in_dim": _named("shape"),
    "random_bits": _named("shape"),
    "empty": _named("shape"),
    "empty2": _named("shape"),
    "reshape": _named("new_sizes"),
    "dynamic_slice": _named("slice_sizes"),
    "slice": _slice,
    "gather": _gather,
    "split": _split,
    "tile": _tile,
    "conv_general_dilated": _convolution,
}

"""A traced call at the widths of a plan: which index of which array is kept.

The plan decides on the leaves of the variables; a walk of the call's jaxpr carries
the decision to every array of it. Unlike a graph, nothing is pinned because it is an
output: the call may be one for training, with statistics among its results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex

from jaxprune import trees
from jaxprune.conv import plain_convolutions
from jaxprune.errors import EmissionError
from jaxprune.graph import Record, Site, Value
from jaxprune.graph.atoms import Atoms, Classes
from jaxprune.graph.evaluate import sub_jaxprs
from jaxprune.graph.interpret import Walk
from jaxprune.graph.means import Divisor, divisor_at, term_counts
from jaxprune.graph.rules import RULES

Masks = Mapping[tuple[str, int], np.ndarray]


@dataclass(frozen=True, eq=False)
class Program:
    """A jaxpr and what is kept in it.

    Attributes:
      closed: flat leaves of the variables, then of the inputs -> flat outputs.
      records: by call site.
      output: the tree of the outputs.
      label: int array (nodes,), the class of each node of the walk.
      keep: bool array (classes,).
    """

    closed: jex.ClosedJaxpr
    records: Mapping[Site, Record]
    output: Any
    label: np.ndarray
    keep: np.ndarray

    def kept(self, axis: np.ndarray) -> np.ndarray:
        """bool array (n,): which indices of a node vector are kept."""
        return self.keep[self.label[axis]]

    def shape(self, value: Value, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape that is left of an array."""
        return tuple(
            size if axis is None else int(self.kept(axis).sum())
            for axis, size in zip(value.axes, shape, strict=True)
        )

    def take(self, array: Any, value: Value) -> Any:
        """What is left of a full-size array, NumPy's or JAX's."""
        take = jnp.take if isinstance(array, jax.Array) else np.take
        for dim, axis in enumerate(value.axes):
            if axis is not None and not self.kept(axis).all():
                array = take(array, np.flatnonzero(self.kept(axis)), axis=dim)
        return array


def shape_of(atom: Any) -> tuple[int, ...]:
    """The full shape of a variable or literal of a jaxpr."""
    return tuple(atom.aval.shape)


def program_of(
    call: Callable[..., Any], variables: Any, inputs: Sequence[Any], masks: Masks
) -> Program:
    """The program of `call(variables, *inputs)` under masks of the variables' axes.

    Args:
      variables, inputs: trees of ShapeDtypeStructs at full size.
      masks: {(path, axis): bool array (n,)}, True where an index is kept.

    Raises:
      EmissionError: the call needs channels to go together that the masks part.
    """
    with plain_convolutions():
        closed, shapes = jax.make_jaxpr(lambda v, i: call(v, *i), return_shape=True)(
            variables, tuple(inputs)
        )
    atoms = Atoms()
    streams = getattr(call, "random_state", ())
    walk = Walk(atoms, RULES, tables=True, streams=streams)
    leaves = {
        path: Value(tuple(walk.fresh(size) for size in leaf.shape), pure=True)
        for path, leaf in trees.flatten(variables).items()
    }
    others = [
        Value((None,) * len(leaf.shape)) for leaf in jax.tree.leaves(tuple(inputs))
    ]
    walk.closed(closed, [*leaves.values(), *others])
    classes = atoms.solve()
    keep = _decide(classes, leaves, masks)
    return Program(
        closed, walk.records, jax.tree.structure(shapes), classes.label, keep
    )


def _decide(classes: Classes, leaves: Mapping[str, Value], masks: Masks) -> np.ndarray:
    """bool array (classes,): what the leaves' masks say of every class."""
    low = np.ones(classes.frozen.size, bool)
    high = np.zeros_like(low)
    known = np.zeros_like(low)
    for path, value in leaves.items():
        for dim, axis in enumerate(value.axes):
            if axis is None:
                continue
            mask = masks.get((path, dim), np.ones(axis.size, bool))
            label = classes.label[axis]
            np.logical_and.at(low, label, mask)
            np.logical_or.at(high, label, mask)
            known[label] = True
            torn = low[label] != high[label]
            if torn.any() or (classes.frozen[label] & ~mask).any():
                raise EmissionError(
                    f"{path} axis {dim}: this call ties indices together that the plan "
                    "parts, or uses them in a way that no rule knows; replay a call "
                    "that makes the same use of its arrays as the one traced"
                )
    keep = np.where(known, low, True)
    node, first, second = classes.label[classes.products[:3]]
    _factors_of_products(keep, known, node, (first, second))
    both = keep[first] & keep[second]
    if (keep[node] != both)[known[node]].any():
        raise EmissionError(
            "this call splits an axis in rows and columns of which the plan removes "
            "single cells; replay a call with the reshapes of the one traced"
        )
    open_ = ~known[node]
    keep[node[open_]] = both[open_]
    return keep


def _factors_of_products(
    keep: np.ndarray,
    known: np.ndarray,
    node: np.ndarray,
    factors: tuple[np.ndarray, np.ndarray],
) -> None:
    """Decides unknown factors in place: one goes if all of its products go."""
    while True:
        found = False
        for factor in factors:
            rows = known[node] & ~known[factor]
            if rows.any():
                any_kept = np.zeros_like(keep)
                np.logical_or.at(any_kept, factor[rows], keep[node[rows]])
                keep[factor[rows]] = any_kept[factor[rows]]
                known[factor[rows]] = found = True
        if not found:
            return


# Constants ------------------------------------------------------------------------

Constants = dict[Site, list[Any]]


def constants(program: Program, own: frozenset[Divisor] = frozenset()) -> Constants:
    """By site, what replaces constant operands; None leaves an operand as it is.

    Arrays lose what the plan removes. A literal that divides a sum by the number of
    its terms (a mean, so also the statistics of a norm) counts the terms left, but
    where `own` says that the number is the source's own.
    """
    found: Constants = {}
    counts = term_counts(program.closed, program.records, program.shape)
    counts = {
        site: count
        for site, count in counts.items()
        if divisor_at(program.records[site], count[0]) not in own
    }
    _constants(program, program.closed, (), counts, found)
    return found


def _constants(
    program: Program,
    closed: jex.ClosedJaxpr,
    site: Site,
    counts: Mapping[Site, tuple[int, Any]],
    found: Constants,
) -> None:
    held = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    for number, eqn in enumerate(closed.jaxpr.eqns):
        here = (*site, number)
        record = program.records[here]
        new: list[Any] = [None] * len(eqn.invars)
        for k, (atom, value) in enumerate(zip(eqn.invars, record.inputs, strict=True)):
            literal = isinstance(atom, jex.Literal)
            array = atom.val if literal else held.get(atom)
            shape = shape_of(atom)
            if array is not None and program.shape(value, shape) != shape:
                new[k] = program.take(array, value)
        if here in counts:
            place, number_left = counts[here]
            new[place] = number_left
        found[here] = new
        inner = sub_jaxprs(eqn)
        for branch, deeper in enumerate(inner):
            single = len(inner) == 1 and record.name != "cond"
            deep = here if single else (*here, branch)
            _constants(program, deeper, deep, counts, found)

"""ChannelGraph: what `trace` returns and every later stage reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from jaxprune import trees
from jaxprune.conv import plain_convolutions
from jaxprune.errors import GraphError, PlanError, PruneError
from jaxprune.graph import channels as channels_lib
from jaxprune.graph.atoms import Atoms, Classes
from jaxprune.graph.counts import Counter, Ledger, Terms, contraction_dims
from jaxprune.graph.describe import describe, explain
from jaxprune.graph.failures import trace_error
from jaxprune.graph.interpret import Record, Site, Value, Walk, axis_in_scope
from jaxprune.graph.pins import (
    ONE_OF_MANY,
    OUTPUT,
    UNUSED,
    Frozen,
    Outputs,
    fixed_outputs,
    frozen_axes,
    pin_ignored,
    pin_unused,
)
from jaxprune.graph.rules import RULES
from jaxprune.graph.wiring import Wiring
from jaxprune.records import Group, Plan


@dataclass(eq=False)
class ChannelGraph:
    """The channels of a traced model, and everything known of their use.

    Attributes:
      groups: channels that are ranked against each other, in network order.
      frozen: axes of the variables that cannot shrink at all, with the reason.
      unknown: {primitive: source line} of operations without a rule.
      handle: the model, as its framework runs and rebuilds it.
      variables: as given to `trace`; arrays or ShapeDtypeStructs.
      inputs: shapes and dtypes of the example inputs.
      closed: the jaxpr of the forward pass: leaves of the variables, then inputs.
      records: one per equation and call site, in the order of execution.
      leaves: node vectors of the variables, by name.
      results: what the walk knew of each output, flat.
      outputs: as given to `trace`, the outputs that keep their shapes.
      ignore, replay, tied: as given to `trace`.
      notes: what the handle noted while it was traced.
      unnamed: the channel axis of noted layers that hold no array, by path.
      aligned: what the static check found for the last plans, by channel mask.
      helped: which changes of stated numbers got a slim program further.
      followed: the numbers that got the program of the last plan furthest.
    """

    groups: tuple[Group, ...]
    frozen: tuple[Frozen, ...]
    unknown: Mapping[str, str]
    handle: Any
    variables: Any
    inputs: tuple[Any, ...]
    closed: jex.ClosedJaxpr
    records: Mapping[Site, Record]
    channels: channels_lib.Channels
    classes: Classes
    leaves: Mapping[str, Value]
    results: tuple[Value, ...] = ()
    outputs: Outputs = None
    ignore: tuple[str, ...] = ()
    replay: bool = False
    tied: tuple[tuple[str, ...], ...] = ()
    notes: Mapping[str, int] = field(default_factory=dict)
    unnamed: Mapping[str, np.ndarray] = field(default_factory=dict)
    aligned: dict[bytes, Any] = field(default_factory=dict)
    helped: dict[Any, bool] = field(default_factory=dict)
    followed: dict[tuple[str, str], int] = field(default_factory=dict)
    _kept: dict[bytes, np.ndarray] = field(default_factory=dict)
    _places: dict[bytes, dict[tuple[str, int], Any]] = field(default_factory=dict)
    _needs: dict[int, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)

    @cached_property
    def wiring(self) -> Wiring:
        """Who makes and who reads each array of the program."""
        return Wiring.of(self.closed, list(self.leaves))

    @cached_property
    def numbers(self) -> Mapping[str, tuple[type, Mapping[str, int]]]:
        """{path of a module: (class, {attribute: number})} of the numbers it states."""
        structs = jax.tree.map(_struct, self.variables)
        return self.handle.numbers(structs, *self.inputs)

    @cached_property
    def reads(self) -> list[tuple[Site, str]]:
        """Where the program reads its variables, in order: (site, leaf)."""
        return [
            (site, value.source)
            for site, record in sorted(self.records.items())
            for value in record.inputs
            if value.source is not None
        ]

    # Groups and plans ---------------------------------------------------------

    def group(self, name: str) -> Group:
        """The group of that name."""
        for group in self.groups:
            if group.name == name:
                return group
        raise PlanError(
            f"there is no group {name!r}; the graph has "
            f"{[group.name for group in self.groups][:12]}"
        )

    def full_plan(self) -> Plan:
        """The plan that keeps everything."""
        sizes = {group.name: group.size for group in self.groups}
        return Plan({name: np.arange(size) for name, size in sizes.items()}, sizes)

    def complete(self, plan: Plan | Mapping[str, Any]) -> Plan:
        """The plan checked against this graph; groups it leaves out are kept whole.

        Raises:
          PlanError: unknown groups, or sizes other than this graph's.
        """
        sizes = {group.name: group.size for group in self.groups}
        if not isinstance(plan, Mapping):
            raise PlanError(
                "expected a plan, or a mapping from group names to kept indices, found "
                f"{type(plan).__name__}; make the plan with jp.select"
            )
        if isinstance(plan, Plan) and plan.sizes == sizes and len(plan) == len(sizes):
            return plan
        given = (
            plan.sizes if isinstance(plan, Plan) else {n: sizes.get(n) for n in plan}
        )
        problems = [
            f"group {name!r} is not in this graph"
            if name not in sizes
            else f"group {name!r}: expected {sizes[name]} channels, found {size}"
            for name, size in given.items()
            if name not in sizes or sizes[name] != size
        ]
        if not problems and not isinstance(plan, Plan):
            plan = Plan(plan, {name: sizes[name] for name in plan})
        if problems:
            raise PlanError(
                "this plan is for another model:\n  "
                + "\n  ".join(problems[:8])
                + f"\nthis graph has {list(sizes)[:8]}; make the plan from it with "
                "jp.select"
            )
        assert isinstance(plan, Plan)
        keep = {n: plan.keep.get(n, np.arange(s)) for n, s in sizes.items()}
        return Plan(keep, sizes)

    def unit_mask(self, plan: Plan | Mapping[str, Any]) -> np.ndarray:
        """bool array (channels,): True where the plan keeps the channel."""
        mask = np.ones(self.channels.count, bool)
        plan = self.complete(plan)
        for group in self.groups:
            mask[group.units] = False
            mask[group.units[plan[group.name]]] = True
        return mask

    def place_masks(
        self, plan: Plan | Mapping[str, Any]
    ) -> Mapping[tuple[str, int], Any]:
        """{(path, axis): bool array (n,)} for every axis on which something can go. Of
        the last plan."""
        mask = self.unit_mask(plan)
        key = mask.tobytes()
        if key not in self._places:
            extended = np.append(mask, True)
            self._places.clear()
            self._places[key] = {
                place: extended[needs].all(1)
                for place, needs in self.channels.places.items()
            }
        return self._places[key]

    def layer_masks(self, plan: Plan | Mapping[str, Any]) -> dict[tuple[str, int], Any]:
        """`place_masks`, and as (path, -1) those of layers that hold no array."""
        masks = dict(self.place_masks(plan))
        extended = np.append(self.unit_mask(plan), True)
        for path, axis in self.unnamed.items():
            masks[path, -1] = extended[self.needs(axis)].all(1)
        return masks

    def needs(self, axis: np.ndarray) -> np.ndarray:
        """int array (n, F): the channels that each index of a node vector needs."""
        known = self._needs.get(id(axis))
        if known is None or known[0] is not axis:
            extended = np.append(self.channels.unit_of, -1)
            known = (axis, extended[self.classes.needs(axis)])
            self._needs[id(axis)] = known
        return known[1]

    def kept_nodes(self, mask: np.ndarray) -> np.ndarray:
        """bool array (nodes,): which nodes a channel mask keeps. Of the last mask."""
        key = mask.tobytes()
        if key not in self._kept:
            table = np.append(self.channels.unit_of, -1)[self.classes.table]
            keep = np.asarray(np.append(mask, True)[table].all(1))
            self._kept.clear()
            self._kept[key] = keep[self.classes.label]
        return self._kept[key]

    @cached_property
    def unread(self) -> tuple[str, ...]:
        """Parameters that the traced call does not read; they stay whole."""
        found = {axis.path for axis in self.frozen if axis.reason == UNUSED}
        return tuple(sorted(path for path in found if self.handle.is_parameter(path)))

    def retrace(self, inputs: Sequence[Any]) -> ChannelGraph:
        """The same graph for inputs of other shapes (another batch size)."""
        structs = tuple(jax.tree.map(_struct, tuple(inputs)))
        if structs == self.inputs:
            return self
        found = build(
            self.handle,
            self.variables,
            inputs,
            ignore=self.ignore,
            outputs=self.outputs,
            replay=self.replay,
            tied=self.tied,
        )
        sizes = [{g.name: g.size for g in graph.groups} for graph in (self, found)]
        if sizes[0] != sizes[1]:
            raise GraphError(
                f"inputs of shapes {[s.shape for s in jax.tree.leaves(structs)]} give "
                "other groups than those the graph was traced with, "
                f"{[s.shape for s in jax.tree.leaves(self.inputs)]}; trace again"
            )
        return found

    # Costs ----------------------------------------------------------------------

    @cached_property
    def _costs(self) -> tuple[Counter, dict[str, Terms]]:
        ledger = Ledger(self.needs, self.channels.count)
        terms = {kind: Terms([], []) for kind in ("macs", "params", "bytes")}
        # The batch is the leading axis of the first input, if it has one.
        first = jax.tree_util.tree_leaves(self.inputs)[:1]
        batch = first[0].shape[0] if first and first[0].shape else 1

        def add(kind: str, factor: float, dims: Any) -> None:
            constant, rows = ledger.term(dims)
            terms[kind].coefficient.append(factor * constant)
            terms[kind].axes.append(rows)

        for record in self.records.values():
            dims = contraction_dims(record)
            if dims is not None:
                add("macs", record.repeat / max(batch, 1), dims)
        for path, leaf in trees.flatten(self.variables).items():
            dims = list(zip(self.leaves[path].axes, leaf.shape, strict=True))
            if self.handle.is_parameter(path):
                add("params", 1, dims)
            add("bytes", getattr(leaf.dtype, "itemsize", 4), dims)
        return ledger.counter(), terms

    def cost(self, kind: str, plan: Plan | Mapping[str, Any] | None = None) -> int:
        """MACs of one example, number of parameters, or bytes of all variables.

        Args:
          kind: "macs", "params" or "bytes".
          plan: what is kept; None for the whole model.
        """
        counter, terms = self._costs
        mask = np.ones(max(self.channels.count, 1), bool)
        if plan is not None and self.channels.count:
            mask = self.unit_mask(plan)
        return round(terms[kind].total(counter.sizes(mask)))

    def macs(self, plan: Plan | Mapping[str, Any] | None = None) -> int:
        """Multiply-accumulates of one example in convolutions and matrix products."""
        return self.cost("macs", plan)

    def params(self, plan: Plan | Mapping[str, Any] | None = None) -> int:
        """Number of trainable parameters."""
        return self.cost("params", plan)

    # Reading ----------------------------------------------------------------------

    def __str__(self) -> str:
        return describe(self)

    def explain(self, path: str) -> str:
        """Why the axes of the named leaf are frozen, or what they are tied to."""
        return explain(self, path)


def build(
    handle: Any,
    variables: Any,
    inputs: Sequence[Any],
    *,
    ignore: Sequence[str] = (),
    strict: bool = False,
    outputs: Outputs = None,
    replay: bool = False,
    tied: Sequence[Sequence[str]] = (),
) -> ChannelGraph:
    """The channel graph of `handle(variables, *inputs)`, traced without running it.

    Args:
      handle: the model, called as a pure function of variables and inputs.
      variables: tree of arrays or ShapeDtypeStructs.
      inputs: example inputs; only shapes and dtypes are read.
      ignore: name patterns of groups or leaves that must keep every channel.
      strict: raise at the first operation without a rule instead of freezing.
      outputs: the outputs that keep their shapes: name patterns, or a function that
        picks them from what the model returns; all of them by default.
      replay: let what only a replay can shrink shrink too: positions and constants
        that vary along a channel axis, unequal parts of a cut.
      tied: sets of groups, by name, that are made one: their first channels stay or go
        together, their second ones, and so on.
    """
    ignore = (ignore,) if isinstance(ignore, str) else tuple(ignore)
    structs = jax.tree.map(_struct, (variables, tuple(inputs)))
    notes: dict[str, int] = {}
    try:
        with plain_convolutions():
            closed, returned = jax.make_jaxpr(
                lambda v, i: handle.trace(notes, v, *i), return_shape=True
            )(*structs)
    except PruneError:
        raise
    except Exception as error:
        raise trace_error(error, *structs) from error
    if not jax.tree.leaves(returned):
        raise GraphError(
            "the model returns no array: expected at least one output, found "
            f"{jax.tree.structure(returned)}; pass apply= with the call that returns "
            "what the loss is made of"
        )
    names = list(trees.flatten(structs[0]))
    atoms = Atoms()
    walk = Walk(atoms, RULES, replay, handle.random_state)
    leaves = jax.tree_util.tree_leaves(structs[0])
    values = {}
    for name, leaf in zip(names, leaves, strict=True):
        axes = tuple(walk.fresh(size) for size in leaf.shape)
        values[name] = Value(axes, pure=True, leaf=name, source=name)
    owners = channels_lib.Leaves.of(values, atoms.count)
    others = jax.tree_util.tree_leaves(structs[1])
    given = [Value((None,) * len(leaf.shape)) for leaf in others]
    results = walk.closed(closed, [*values.values(), *given])
    walk.pin_rest()
    for value, fixed in zip(results, fixed_outputs(returned, outputs), strict=True):
        if fixed:
            walk.pin(value.axes, OUTPUT if len(results) == 1 else ONE_OF_MANY)
    pin_unused(walk, closed, values)
    records = dict(sorted(walk.records.items()))
    roles = channels_lib.roles(atoms, list(records.values()), owners)
    pin_ignored(walk, values, ignore, roles[0])
    if strict and walk.unknown:
        name, where = next(iter(walk.unknown.items()))
        raise GraphError(
            f"operation {name!r} at {where} has no rule, so nothing it touches can "
            "be pruned; trace without strict=True to freeze it"
        )
    unnamed = {}
    for path in notes:
        if not any(name.startswith(f"params/{path}/") for name in values):
            axis = axis_in_scope(records.values(), path)
            unnamed.update({} if axis is None else {path: axis})
    classes = atoms.solve()
    channels = channels_lib.build(classes, values, *roles)
    if tied:
        channels_lib.tie(atoms, classes, channels, tied)
        classes = atoms.solve()
        channels = channels_lib.build(classes, values, *roles, channels.groups)
    return ChannelGraph(
        groups=channels.groups,
        frozen=frozen_axes(atoms, classes, values, channels),
        unknown=dict(walk.unknown),
        handle=handle,
        variables=variables,
        inputs=structs[1],
        closed=closed,
        records=records,
        channels=channels,
        classes=classes,
        leaves=values,
        results=tuple(results),
        outputs=outputs,
        ignore=ignore,
        replay=replay,
        tied=tuple(map(tuple, tied)),
        notes=notes,
        unnamed=unnamed,
    )


def _struct(leaf: Any) -> jax.ShapeDtypeStruct:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    array = np.asarray(leaf)
    return jax.ShapeDtypeStruct(array.shape, jax.dtypes.canonicalize_dtype(array.dtype))

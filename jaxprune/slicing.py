"""Slices, masks and mirrors of the variables under a plan; no model is rebuilt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune import trees
from jaxprune.errors import GraphError, PlanError, ScoreError
from jaxprune.graph import ChannelGraph
from jaxprune.records import Group, Plan

Keep = Mapping[str, Mapping[int, np.ndarray]]


def keep_indices(graph: ChannelGraph, plan: Plan | Mapping[str, Any]) -> Keep:
    """{leaf: {axis: kept indices}}, sorted; only axes that lose something.

    Raises:
      PlanError: the plan is not for this graph, or empties an axis.
    """
    found: dict[str, dict[int, np.ndarray]] = {}
    for (path, axis), mask in graph.place_masks(plan).items():
        if not mask.any():
            raise PlanError(
                f"the plan keeps nothing of {path} axis {axis} ({mask.size}); keep at "
                "least one channel of every group on it"
            )
        if not mask.all():
            found.setdefault(path, {})[axis] = np.flatnonzero(mask)
    return found


def take(leaf: Any, keep: Mapping[int, np.ndarray]) -> Any:
    """The leaf with only the kept indices of the given axes (abstract or real)."""
    if isinstance(leaf, jax.ShapeDtypeStruct):
        shape = [
            keep[axis].size if axis in keep else size
            for axis, size in enumerate(leaf.shape)
        ]
        return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)
    if not keep:
        return leaf
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        for axis, indices in keep.items():
            leaf = jnp.take(leaf, indices, axis=axis)
        return leaf
    # On the host: one copy, where jnp.take would compile once per shape.
    small = np.asarray(leaf)
    for axis, indices in keep.items():
        small = np.take(small, indices, axis=axis)
    return small if isinstance(leaf, np.ndarray) else jnp.asarray(small)


def slice_variables(
    graph: ChannelGraph, plan: Plan | Mapping[str, Any], variables: Any
) -> Any:
    """The variables tree with what the plan removes taken out of every collection."""
    keep = keep_indices(graph, plan)
    leaves = checked_leaves(graph, variables)
    return trees.unflatten_like(
        variables,
        {path: take(leaf, keep.get(path, {})) for path, leaf in leaves.items()},
    )


def checked_leaves(graph: ChannelGraph, variables: Any) -> dict[str, Any]:
    """The leaves by name.

    Raises:
      GraphError: names or shapes are not those that were traced.
    """
    leaves = trees.flatten(trees.arrays(variables))
    traced = trees.flatten(graph.variables)
    problems = [f"{path} is missing" for path in traced if path not in leaves]
    problems += [f"{path} is not in the model" for path in leaves if path not in traced]
    problems += [
        f"{path}: expected shape {traced[path].shape}, found {leaf.shape}"
        for path, leaf in leaves.items()
        if path in traced and tuple(leaf.shape) != tuple(traced[path].shape)
    ]
    if problems:
        raise GraphError(
            "these variables are not those the graph was traced with:\n  "
            + "\n  ".join(problems[:8])
        )
    return leaves


def check_weights(variables: Any) -> None:
    """Nothing, if no array holds NaN; infinities may be a mask.

    Raises:
      ScoreError: one does, by name.
    """
    for path, leaf in trees.flatten(trees.arrays(variables)).items():
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            continue
        wrong = int(np.isnan(np.asarray(leaf)).sum())  # jnp compiles for each shape
        if wrong:
            raise ScoreError(
                f"{path} holds NaN in {wrong} of {leaf.size} entries: nothing can be "
                "chosen or refitted by such weights; take those of an earlier step, "
                "or repair the array"
            )


def mask_variables(
    graph: ChannelGraph, plan: Plan | Mapping[str, Any], variables: Any
) -> Any:
    """The full-size variables in which removed channels say nothing.

    The consumers' slices are zero. Channels that no kernel reads (the features in which
    queries meet keys) are zero themselves, with all that rides along.
    """
    plan = graph.complete(plan)
    masks: dict[tuple[str, int], np.ndarray] = {}
    places = graph.place_masks(plan)
    for group in graph.groups:
        if group.consumers:
            own = {(s.path, s.axis): places[s.path, s.axis] for s in group.consumers}
        else:
            own = _own_masks(group, plan, places)
        for place, mask in own.items():
            masks[place] = masks.get(place, True) & mask
    leaves = checked_leaves(graph, variables)
    for (path, axis), mask in masks.items():
        leaf = leaves[path]
        shape = [1] * leaf.ndim
        shape[axis] = leaf.shape[axis]
        leaves[path] = leaf * jnp.asarray(mask, leaf.dtype).reshape(shape)
    return trees.unflatten_like(variables, leaves)


def _own_masks(
    group: Group, plan: Plan, places: Mapping[tuple[str, int], np.ndarray]
) -> dict[tuple[str, int], np.ndarray]:
    """{(path, axis): bool array (n,)}: False where the group's removed channels are."""
    gone = np.setdiff1d(np.arange(group.size), plan[group.name])
    masks = {}
    for slot in group.slots:
        mask = np.ones(places[slot.path, slot.axis].size, bool)
        mask[slot.index[gone]] = False
        masks[slot.path, slot.axis] = mask
    return masks

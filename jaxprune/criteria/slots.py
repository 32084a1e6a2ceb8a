"""Values of a group's channels, gathered from the arrays they live in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.errors import ScoreError
from jaxprune.records import Group, Role, Slot

ROLES: tuple[Role, ...] = ("producer", "consumer", "other")
KERNELS: tuple[Role, ...] = ("producer", "consumer")


def magnitudes(array: Any) -> jax.Array:
    """float32, with the signs of real numbers and |w| of complex ones."""
    array = jnp.asarray(array)
    if jnp.iscomplexobj(array):
        array = jnp.abs(array)
    return array.astype(jnp.float32)


def slot_values(array: jax.Array, slot: Slot) -> jax.Array:
    """(C, m, rest): the entries of `array` that belong to each channel of `slot`."""
    moved = jnp.moveaxis(jnp.asarray(array), slot.axis, 0)
    flat = moved.reshape(moved.shape[0], -1)
    return flat[jnp.asarray(slot.index)]


def chosen(
    group: Group, leaves: Mapping[str, Any], roles: Sequence[Role]
) -> dict[str, list[Slot]]:
    """The group's slots of these roles whose array is in `leaves`, by path.

    A group that no kernel makes or reads (learned vectors multiplied entry by entry) has
    slots of the role "other" alone; they stand for those asked for.

    Each (path, axis) appears once, also where a layer is called twice. Statistics are
    not parameters and are never scored: pass the parameters' leaves or gradients only,
    or let `is_parameter` drop what lies in "batch_stats".

    Raises:
      ScoreError: the group has no such slot.
    """
    found: dict[str, list[Slot]] = {}
    seen = set()
    if all(slot.role == "other" for slot in group.slots):
        roles = ("other",)
    for slot in group.slots:
        key = (slot.path, slot.axis)
        if slot.role not in roles or key in seen or slot.path not in leaves:
            continue
        if not is_parameter(slot.path):
            continue
        seen.add(key)
        found.setdefault(slot.path, []).append(slot)
    if not found:
        raise ScoreError(
            f"group {group.name!r} has no {' or '.join(roles)} among the arrays given; "
            f"its slots are {[f'{s.path} ({s.role})' for s in group.slots][:6]}"
        )
    return found


def is_parameter(path: str) -> bool:
    """False for running statistics, which describe data and not weights."""
    return path.split("/", 1)[0] != "batch_stats"


def group_sum(
    group: Group,
    values: Mapping[str, Any],
    *,
    roles: Sequence[Role] = ROLES,
) -> jax.Array:
    """(C,): sum over every entry of each channel, no entry counted twice.

    An array that a channel enters by two axes (a recurrent kernel) is summed over the
    union: sums over each axis less the entries on both (inclusion and exclusion).

    Args:
      values: entry-wise values by path, of the arrays' shapes.
    """
    total = jnp.zeros(group.size, jnp.float32)
    for path, slots in chosen(group, values, roles).items():
        array = jnp.asarray(values[path], jnp.float32)
        for part, sign in _subsets(slots):
            total += sign * _common(array, part)
    return total


def _subsets(slots: list[Slot]) -> Iterator[tuple[tuple[Slot, ...], float]]:
    for count in range(1, len(slots) + 1):
        for part in itertools.combinations(slots, count):
            yield part, (-1.0) ** (count + 1)


def _common(array: jax.Array, slots: Sequence[Slot]) -> jax.Array:
    """(C,): sum over the entries that lie on all of these axes at once."""
    axes = tuple(s.axis % array.ndim for s in slots)
    rest = tuple(a for a in range(array.ndim) if a not in axes)
    # What is left has the axes in ascending order; index it in that order.
    ordered = [slots[i] for i in sorted(range(len(slots)), key=axes.__getitem__)]
    reduced = array.sum(rest)
    index = []
    for i, slot in enumerate(ordered):
        shape = [slot.index.shape[0]] + [1] * len(ordered)
        shape[i + 1] = slot.index.shape[1]
        index.append(slot.index.reshape(shape))
    return reduced[tuple(index)].reshape(slots[0].index.shape[0], -1).sum(1)


def channel_matrix(
    group: Group, leaves: Mapping[str, Any], *, roles: Sequence[Role]
) -> jax.Array:
    """(C, D): all entries of each channel in these roles as one row; real and imaginary
    parts of complex ones."""
    parts = [
        slot_values(leaves[path], slot).reshape(group.size, -1)
        for path, slots in chosen(group, leaves, roles).items()
        for slot in slots
    ]
    matrix = jnp.concatenate(parts, axis=1)
    if jnp.iscomplexobj(matrix):
        matrix = jnp.concatenate([matrix.real, matrix.imag], axis=1)
    return matrix.astype(jnp.float32)

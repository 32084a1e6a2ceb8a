"""Sums that a tap's output enters: what the other branch has lost can be made up for.

He, Zhang, Sun 2017 (arXiv:1707.06168, section 3.3): the last layer of a residual branch
is refitted not to its own output Y but to what the sum is short of,

    Y + (other branch in the original network - other branch in the current one) / gain

where gain is the scale, if any, between the layer and the sum (a BatchNorm's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.graph import ChannelGraph, Site
from jaxprune.graph.interpret import CASTS
from jaxprune.methods.taps import Tap, sole_users

# Outputs whose gain is below this share of the largest are left as they are: no weight
# of theirs reaches the sum.
SMALLEST_GAIN = 1e-3


@dataclass(frozen=True, eq=False)
class Shortcut:
    """A sum `gain * Y + shift + other` of a tap's output Y.

    Attributes:
      site, operand: the sum, and which of its operands is the other branch.
      scales: (site, operand, whether it divides) of the factors on the way.
    """

    site: Site
    operand: int
    scales: tuple[tuple[Site, int, bool], ...]


def find_shortcuts(
    graph: ChannelGraph, taps: Sequence[Tap], turn: Mapping[Site, int]
) -> dict[Site, Shortcut]:
    """{tap's site: the sum that its refit compensates}.

    Where both summands come straight from taps, the one that is refitted later
    compensates; those that are refitted together leave the sum alone.

    Args:
      turn: when a tap is (last) refitted; it may lack those that never are.
    """
    found = {site: _follow(graph, site) for site in {tap.site for tap in taps}}
    sums = {site: shortcut for site, shortcut in found.items() if shortcut is not None}
    meeting: dict[Site, list[Site]] = {}
    for site, shortcut in sums.items():
        meeting.setdefault(shortcut.site, []).append(site)
    return {
        site: shortcut
        for site, shortcut in sums.items()
        if site in turn
        and all(
            turn[site] > turn.get(s, -1) for s in meeting[shortcut.site] if s != site
        )
    }


def _follow(graph: ChannelGraph, tap: Site) -> Shortcut | None:
    """Through shifts and scales by arrays of the variables, up to the sum."""
    scales: list[tuple[Site, int, bool]] = []
    for site, mine in sole_users(graph, tap):
        record = graph.records[site]
        name = record.name
        if name in CASTS:
            continue
        if len(record.inputs) != 2:
            return None
        pure = record.inputs[1 - mine].pure
        if name in ("mul", "div") and pure and not (name == "div" and mine == 1):
            scales.append((site, 1 - mine, name == "div"))
        elif name in ("add", "add_any") and not pure:
            return Shortcut(site, 1 - mine, tuple(scales))
        elif not (
            pure and (name in ("add", "add_any") or (name == "sub" and not mine))
        ):
            return None
    return None


def compensated(
    target: jax.Array, lost: jax.Array, gains: Sequence[tuple[jax.Array, bool]]
) -> jax.Array:
    """Y plus what the sum is short of, seen before the gains.

    Args:
      target: Y of the original network.
      lost: the other branch, original minus current, of the same shape; where the sum
        repeats Y along an axis of size 1, Y makes up for the mean.
      gains: the factors (broadcast against Y), and whether they divide.
    """
    gain = jnp.ones((), jnp.float32)
    for factor, divides in gains:
        by = jnp.asarray(factor, jnp.float32)
        gain = gain / by if divides else gain * by
    reaches = jnp.abs(gain) > SMALLEST_GAIN * jnp.abs(gain).max()
    missing = lost.astype(jnp.float32) / jnp.where(reaches, gain, 1)
    missing = jnp.where(reaches, missing, 0)
    shape = jnp.broadcast_shapes(missing.shape, target.shape)
    missing = jnp.broadcast_to(missing, shape)
    repeated = tuple(d for d, size in enumerate(target.shape) if size < shape[d])
    return target + missing.mean(repeated, keepdims=True).astype(target.dtype)


def captured_sites(shortcuts: Mapping[Site, Shortcut]) -> set[Site]:
    """Every step whose operands `compensated` needs."""
    return {s.site for s in shortcuts.values()} | {
        site for s in shortcuts.values() for site, _, _ in s.scales
    }


def from_operands(
    shortcut: Shortcut,
    target: jax.Array,
    original: Mapping[Site, Sequence[Any]],
    current: Mapping[Site, Sequence[Any]],
) -> jax.Array:
    """`compensated`, from the operands of `captured_sites` in both networks."""
    lost = (
        original[shortcut.site][shortcut.operand]
        - current[shortcut.site][shortcut.operand]
    )
    gains = [(original[site][k], divides) for site, k, divides in shortcut.scales]
    return compensated(target, lost, gains)

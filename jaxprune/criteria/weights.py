"""Criteria from the weights alone: no data, a few passes over the arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.criteria.slots import (
    KERNELS,
    channel_matrix,
    chosen,
    group_sum,
    magnitudes,
    slot_values,
)
from jaxprune.errors import ScoreError
from jaxprune.records import Group, Role

SCALES = ("scale", "gamma")


def l1(
    group: Group, leaves: Mapping[str, Any], *, roles: Sequence[Role] = KERNELS
) -> jax.Array:
    """(C,): sum of |w| over the channel's kernel slices.

    Li et al. 2017 (arXiv:1608.08710) sum the filter, roles=("producer",); with the
    consumers it is the group form of DepGraph (arXiv:2301.12900). Biases, norm
    scales and depthwise kernels are not counted.
    """
    return group_sum(group, _map(jnp.abs, leaves, group), roles=roles)


def l2(
    group: Group, leaves: Mapping[str, Any], *, roles: Sequence[Role] = KERNELS
) -> jax.Array:
    """(C,): square root of the sum of w^2 over the channel's kernel slices."""
    return jnp.sqrt(group_sum(group, _map(jnp.square, leaves, group), roles=roles))


def bn_scale(group: Group, leaves: Mapping[str, Any]) -> jax.Array:
    """(C,): mean |gamma| of the norms on the channel.

    Network slimming, Liu et al. 2017 (arXiv:1708.06519), meant for networks trained
    with an L1 penalty on gamma.

    Raises:
      ScoreError: no norm with a scale lies on this group.
    """
    paths = {
        s.path: s for s in group.slots if s.path.rsplit("/", 1)[-1].lower() in SCALES
    }
    found = [s for p, s in paths.items() if p in leaves and s.role == "other"]
    if not found:
        raise ScoreError(
            f"group {group.name!r} has no norm with a scale, so bn_scale cannot rank "
            "it; use another criterion, or ignore this group"
        )
    gammas = [jnp.abs(slot_values(leaves[s.path], s)).mean((1, 2)) for s in found]
    return jnp.stack(gammas).mean(0)


def fpgm(
    group: Group, leaves: Mapping[str, Any], *, roles: Sequence[Role] = ("producer",)
) -> jax.Array:
    """(C,): sum of Euclidean distances to the group's other filters.

    He et al. 2019 (arXiv:1811.00250): a filter near the geometric median of its layer
    can be replaced by the others. One C x D by D x C matrix product. Distances are
    taken from centred filters, which keeps close ones apart in float32.
    """
    w = channel_matrix(group, leaves, roles=roles)
    w = w - w.mean(0)
    squares = (w * w).sum(1)
    product = jnp.matmul(w, w.T, precision=jax.lax.Precision.HIGHEST)
    distance = jnp.sqrt(jnp.maximum(squares[:, None] + squares[None] - 2 * product, 0))
    return (distance * (1 - jnp.eye(len(w)))).sum(1)


def lamp(
    group: Group, leaves: Mapping[str, Any], *, roles: Sequence[Role] = KERNELS
) -> jax.Array:
    """(C,): the channel's sum of w^2 over that of all channels that are not smaller.

    Lee et al. 2021 (arXiv:2010.07611), by channel: u_c^2 / sum_{d: u_d >= u_c} u_d^2.
    Comparable across groups without normalisation; the largest channel scores 1.
    Equal channels are taken in the order of their index, the later as the smaller.
    """
    energy = group_sum(group, _map(jnp.square, leaves, group), roles=roles)
    order = jnp.lexsort((jnp.arange(group.size), -energy))
    ranked = energy[order]
    share = ranked / jnp.maximum(jnp.cumsum(ranked), 1e-30)
    return jnp.zeros_like(energy).at[order].set(share)


def random(group: Group, leaves: Mapping[str, Any], *, key: jax.Array) -> jax.Array:
    """(C,): uniform in [0, 1); the baseline that any criterion has to beat.

    The group's name is folded into `key`, so one key serves all groups.
    """
    del leaves
    name = np.frombuffer(group.name.encode(), np.uint8)
    for byte in name:
        key = jax.random.fold_in(key, int(byte))
    return jax.random.uniform(key, (group.size,))


def _map(fn, leaves: Mapping[str, Any], group: Group) -> dict[str, jax.Array]:
    paths = chosen(group, leaves, ("producer", "consumer", "other"))
    return {path: fn(magnitudes(leaves[path])) for path in paths}

"""Criteria from gradients of the loss: of a batch, or of each example.

For a gate b_c = 1 that multiplies channel c's parameters, dL/db_c = <w_c, dL/dw_c>:
no hooks in the model are needed. Scaling a norm's input kernel leaves that product as
it is, so none of these depends on the arbitrary scale of layers before a BatchNorm.

With all roles, the default, the gate multiplies the channel wherever it is made, shifted
and read, as in Torch-Pruning: a channel of a convolution, a BatchNorm and a consumer
counts about three times, in a square about nine times, what it does with a gate on its
activation alone, which the papers mean. That one is `roles=CONSUMERS`, exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.criteria.slots import ROLES, group_sum
from jaxprune.records import Group, Role

CONSUMERS: tuple[Role, ...] = ("consumer",)


def gate_gradient(
    group: Group,
    leaves: Mapping[str, Any],
    grads: Mapping[str, Any],
    *,
    roles: Sequence[Role] = ROLES,
) -> jax.Array:
    """(C,): sum of w * dL/dw over the channel's parameters in these roles."""
    products = {
        path: (_wide(leaves[path]) * _wide(g)).real  # as JAX conjugates gradients
        for path, g in _relevant(group, grads).items()
        if path in leaves
    }
    return group_sum(group, products, roles=roles)


def gate_gradients(
    group: Group,
    leaves: Mapping[str, Any],
    example_grads: Mapping[str, Any],
    *,
    roles: Sequence[Role] = ROLES,
) -> jax.Array:
    """(B, C): `gate_gradient` for the gradients (B, ...) of each example."""
    relevant = {p: g for p, g in _relevant(group, example_grads).items() if p in leaves}

    def one(grads):
        return gate_gradient(group, leaves, grads, roles=roles)

    return jax.vmap(one)(relevant)


def taylor(group: Group, leaves, grads, *, roles: Sequence[Role] = ROLES) -> jax.Array:
    """(C,): |sum of w * dL/dw| over the channel's slots, of a batch's mean loss.

    First-order Taylor expansion of the loss in the channel's gate, Molchanov et al.
    2017 (arXiv:1611.06440). Near a minimum the mean gradient vanishes: prefer
    `taylor_examples`, which costs one backward pass per example.
    """
    return jnp.abs(gate_gradient(group, leaves, grads, roles=roles))


def taylor_examples(
    group: Group, leaves, example_grads, *, roles: Sequence[Role] = ROLES
) -> jax.Array:
    """(C,): mean over examples of |sum of w * dL_i/dw|; example_grads (B, ...).

    Average over batches of equal size to stream over a data set.
    """
    gates = gate_gradients(group, leaves, example_grads, roles=roles)
    return jnp.abs(gates).mean(0)


def fisher(
    group: Group, leaves, example_grads, *, roles: Sequence[Role] = ROLES
) -> jax.Array:
    """(C,): 1/2 mean over examples of (sum of w * dL_i/dw)^2.

    The diagonal Fisher information of the channel's gate, Theis et al. 2018
    (arXiv:1801.05787): with `roles=CONSUMERS` the second-order loss of removing the
    channel.
    """
    gates = gate_gradients(group, leaves, example_grads, roles=roles)
    return 0.5 * jnp.square(gates).mean(0)


def hessian(
    group: Group, leaves, example_grads, *, roles: Sequence[Role] = ROLES
) -> jax.Array:
    """(C,): 1/2 sum of w^2 * mean over examples of (dL_i/dw)^2.

    Optimal brain damage (LeCun et al. 1990) with the empirical Fisher as the diagonal
    of the Hessian: weight by weight, where `fisher` takes the channel as a whole.
    """
    squares = {
        path: 0.5
        * jnp.square(jnp.abs(_wide(leaves[path])))
        * jnp.square(jnp.abs(_wide(g))).mean(0)
        for path, g in _relevant(group, example_grads).items()
        if path in leaves
    }
    return group_sum(group, squares, roles=roles)


def gate_gain(group: Group, leaves, grads) -> jax.Array:
    """(C,): -<W_c, dL/dW_c> over the consumers: what the loss gains from the channel.

    The classification-loss term t_c of CPLI, signed: L(b_c = 0) - L(b_c = 1) to first
    order, with a gate on what the consumers read.
    """
    return -gate_gradient(group, leaves, grads, roles=CONSUMERS)


def gate_gain_examples(group: Group, leaves, example_grads) -> jax.Array:
    """(C,): mean over examples of |<W_c, dL_i/dW_c>| over the consumers."""
    return taylor_examples(group, leaves, example_grads, roles=CONSUMERS)


def _wide(array: Any) -> jax.Array:
    """float32, or complex64 if it is complex."""
    array = jnp.asarray(array)
    return array.astype(jnp.complex64 if jnp.iscomplexobj(array) else jnp.float32)


def _relevant(group: Group, grads: Mapping[str, Any]) -> dict[str, Any]:
    paths = {slot.path for slot in group.slots}
    return {path: g for path, g in grads.items() if path in paths}

"""What the reference architectures share: layers, head, widths read off shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxprune.conv import conv_general_dilated
from jaxprune.errors import ConfigError, GraphError
from jaxprune.trees import flatten

_KERNEL_INIT = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


def conv(
    features: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    use_bias: bool = False,
    dtype: Any = None,
    name: str,
) -> nn.Conv:
    """A square convolution, padded by (kernel - 1) // 2 on all sides as PyTorch does.

    He initialisation over the fan-out; XLA's "SAME" would pad strided convolutions
    on one side only.
    """
    pad = (kernel - 1) // 2
    return nn.Conv(
        features,
        (kernel, kernel),
        strides=(stride, stride),
        padding=((pad, pad), (pad, pad)),
        use_bias=use_bias,
        dtype=dtype,
        kernel_init=_KERNEL_INIT,
        conv_general_dilated=conv_general_dilated,
        name=name,
    )


def as_logits(x: jax.Array) -> jax.Array:
    """`x` in at least float32, so that the loss of a bfloat16 model is stable."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def width_of(variables: Mapping[str, Any], path: str, axis: int = -1) -> int:
    """The size of one axis of the leaf at `path`, such as "params/conv0/kernel".

    Raises:
      GraphError: there is no such leaf.
    """
    leaf: Any = variables
    for part in path.split("/"):
        leaf = leaf.get(part) if isinstance(leaf, Mapping) else None
    if leaf is None:
        raise GraphError(
            f"the variables have no leaf {path!r}; they hold "
            f"{list(flatten(variables))[:5]} ...; "
            'pass the whole tree, {"params": ..., "batch_stats": ...}, of a model of '
            "this architecture and depth"
        )
    return int(leaf.shape[axis])


def scale_width(width: int, by: float) -> int:
    """`width` times `by`, rounded, at least 1."""
    return max(1, round(width * by))


def check_lengths(module: nn.Module, expected: int, *names: str) -> None:
    """Raises ConfigError unless each named field holds `expected` entries."""
    for name in names:
        found = len(getattr(module, name))
        if found != expected:
            raise ConfigError(
                f"{type(module).__name__}.{name}: expected {expected} entries, one "
                f"for each block, found {found}; give as many as there are blocks"
            )

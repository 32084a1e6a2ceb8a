"""The optimisers that training offers, with their learning rate schedule."""

from __future__ import annotations

from typing import Any, Literal

import jax
import optax

from jaxprune.errors import ConfigError

Optimizer = Literal["sgd", "adamw"]


def schedule(
    *, learning_rate: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Linear from 0 over the warm-up, then a half cosine down to 0."""
    return optax.warmup_cosine_decay_schedule(
        init_value=learning_rate if warmup_steps == 0 else 0.0,
        peak_value=learning_rate,
        warmup_steps=warmup_steps,
        decay_steps=max(total_steps, warmup_steps + 1),
    )


def _kernels(params: Any) -> Any:
    """True for kernels and embeddings, False for biases and norm scales."""
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


def make_optimizer(
    name: str,
    rate: optax.Schedule,
    *,
    momentum: float,
    weight_decay: float,
    decay_all: bool,
    clip_norm: float | None,
) -> optax.GradientTransformation:
    """SGD with Nesterov momentum and L2 decay, or AdamW.

    Args:
      name: "sgd" or "adamw".
      rate: learning rate by step.
      momentum: of SGD.
      weight_decay: L2 coefficient of SGD, decoupled decay of AdamW.
      decay_all: decay biases and norm scales too.
      clip_norm: largest global norm of a gradient, None for no limit.

    Raises:
      ConfigError: `name` is neither.
    """
    mask = None if decay_all else _kernels
    if name == "sgd":
        steps: list[optax.GradientTransformation] = [
            optax.add_decayed_weights(weight_decay, mask),
            optax.sgd(rate, momentum, nesterov=True),
        ]
    elif name == "adamw":
        steps = [optax.adamw(rate, weight_decay=weight_decay, mask=mask)]
    else:
        raise ConfigError(f"optimizer={name!r} is unknown; use 'sgd' or 'adamw'")
    if clip_norm is not None:
        steps.insert(0, optax.clip_by_global_norm(clip_norm))
    return optax.chain(*steps)

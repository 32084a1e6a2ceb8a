"""How a Linen classifier is called, for inference and for training."""

from __future__ import annotations

from typing import Any

import jax

from jaxprune.frameworks.linen import inference_flags


def predict(model: Any, variables: Any, x: jax.Array) -> jax.Array:
    """Logits float32 (B, classes) in inference mode."""
    return model.apply(variables, x, **inference_flags(model)).astype("float32")


def predict_training(
    model: Any, variables: Any, x: jax.Array, key: jax.Array
) -> tuple[jax.Array, Any]:
    """(logits float32 (B, classes), updated collections) in training mode.

    The updates hold every collection but "params"; `key` drives dropout.
    """
    flags = {name: not value for name, value in inference_flags(model).items()}
    mutable = [name for name in variables if name != "params"]
    logits, updates = model.apply(
        variables, x, mutable=mutable, rngs={"dropout": key}, **flags
    )
    return logits.astype("float32"), dict(updates)

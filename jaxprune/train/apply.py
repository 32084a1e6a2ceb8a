"""How a Linen classifier is called, for inference and for training."""

from __future__ import annotations

import inspect
from typing import Any

import jax


def takes_train(model: Any) -> bool:
    """Whether calls of `model` accept a `train` flag."""
    parameters = inspect.signature(type(model).__call__).parameters
    return "train" in parameters or any(
        p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()
    )


def predict(model: Any, variables: Any, x: jax.Array) -> jax.Array:
    """Logits float32 (B, classes) in inference mode."""
    flags = {"train": False} if takes_train(model) else {}
    return model.apply(variables, x, **flags).astype("float32")


def predict_training(
    model: Any, variables: Any, x: jax.Array, key: jax.Array
) -> tuple[jax.Array, Any]:
    """(logits float32 (B, classes), updated collections) in training mode.

    The updates hold every collection but "params"; `key` drives dropout.
    """
    flags = {"train": True} if takes_train(model) else {}
    mutable = [name for name in variables if name != "params"]
    logits, updates = model.apply(
        variables, x, mutable=mutable, rngs={"dropout": key}, **flags
    )
    return logits.astype("float32"), dict(updates)

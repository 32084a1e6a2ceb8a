"""Early stopping: the best variables by validation accuracy, and when to give up."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Best(NamedTuple):
    """The variables with the highest validation accuracy so far; the earliest of equals.

    Attributes:
      accuracy: float32 ().
      epoch: int32 (), epochs that had been trained; 0 is the start.
      variables: the model's.
    """

    accuracy: Any
    epoch: Any
    variables: Any


def record(best: Best | None, accuracy: float, epoch: int, variables: Any) -> Best:
    """The better of `best` and these."""
    if best is not None and accuracy <= float(best.accuracy):
        return best
    # A copy: the training step consumes the buffers it is given.
    kept = jax.tree.map(jnp.copy, variables)
    return Best(jnp.float32(accuracy), jnp.int32(epoch), kept)


def exhausted(best: Best, epoch: int, patience: int) -> bool:
    """No epoch of the last `patience` ones was better than those before."""
    return epoch - int(best.epoch) >= patience

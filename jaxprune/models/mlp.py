"""A multilayer perceptron."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxprune.models.layers import as_logits, scale_width, width_of


class MLP(nn.Module):
    """Dense layers with ReLU on the flattened input; `hidden0`.., `linear`."""

    hidden_widths: tuple[int, ...] = (128, 128)
    num_classes: int = 10
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool = False) -> jax.Array:
        """Logits (B, num_classes) of inputs (B, ...)."""
        del train
        x = x.reshape(x.shape[0], -1)
        for i, width in enumerate(self.hidden_widths):
            x = nn.relu(nn.Dense(width, dtype=self.dtype, name=f"hidden{i}")(x))
        return as_logits(nn.Dense(self.num_classes, dtype=self.dtype, name="linear")(x))

    def resized(self, variables: Mapping[str, Any]) -> MLP:
        """This architecture with the widths that the shapes of `variables` have.

        Raises:
          GraphError: a layer is missing from `variables`.
        """
        return self.clone(
            hidden_widths=tuple(
                width_of(variables, f"params/hidden{i}/kernel")
                for i in range(len(self.hidden_widths))
            ),
            num_classes=width_of(variables, "params/linear/kernel"),
        )


def mlp(
    *,
    num_classes: int = 10,
    hidden_widths: tuple[int, ...] = (128, 128),
    width: float = 1.0,
) -> MLP:
    """An MLP whose hidden widths are multiplied by `width`."""
    hidden_widths = tuple(scale_width(w, width) for w in hidden_widths)
    return MLP(hidden_widths=hidden_widths, num_classes=num_classes)

"""Linen modules inside NNX objects (nnx.bridge.ToNNX) follow the arrays held there."""

from __future__ import annotations

from flax import nnx
from flax.nnx.bridge.variables import nnx_attrs_to_linen_vars

from jaxprune.frameworks.linen import rebuild

# Attributes of the wrapper that are its own, not the module's variables.
_OWN = ("to_nnx__", "_pytree__")


def resize_linen(model: nnx.Module) -> None:
    """Wraps every Linen module in the object as `linen_resize` does, in place.

    Args:
      model: an object of ours, not the user's.
    """
    for _, module in nnx.iter_modules(model):
        if isinstance(module, nnx.bridge.ToNNX):
            held = {k: v for k, v in vars(module).items() if not k.startswith(_OWN)}
            variables = nnx_attrs_to_linen_vars(held)
            module.to_nnx__module = rebuild(module.to_nnx__module, variables)

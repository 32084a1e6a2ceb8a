"""How a model is called and made smaller, by the framework it comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
from flax import nnx as flax_nnx  # the submodule of that name is ours

from jaxprune.errors import GraphError
from jaxprune.frameworks.function import FunctionHandle
from jaxprune.frameworks.linen import LinenHandle
from jaxprune.frameworks.nnx import NnxHandle

Numbers = Mapping[str, tuple[type, Mapping[str, int]]]

__all__ = ["FunctionHandle", "Handle", "LinenHandle", "NnxHandle", "handle_of"]


class Handle(Protocol):
    """What the stages need of a model."""

    @property
    def model(self) -> Any: ...

    @property
    def random_state(self) -> tuple[Any, ...]:
        """Arrays of the model, not of the variables, that keys are made of."""
        ...

    def __call__(self, variables: Any, *inputs: Any) -> Any: ...

    def is_parameter(self, path: str) -> bool: ...

    def mirror_name(self, path: str) -> str: ...

    def trace(self, notes: dict[str, int], variables: Any, *inputs: Any) -> Any: ...

    def numbers(self, variables: Any, *inputs: Any) -> Numbers:
        """The whole numbers that the user's modules state, by path."""
        ...

    @property
    def stated(self) -> tuple[Any, ...]:
        """Settings that made this model from the user's: of earlier rounds."""
        ...

    def settings(self, notes: Any, masks: Any) -> tuple[Any, ...]: ...

    def rebuild(self, variables: Any, settings: Any = ()) -> Handle: ...


def handle_of(model: Any, apply: Callable[..., Any] | None = None) -> Handle:
    """The handle of a Linen module, an NNX object or a plain function.

    Raises:
      GraphError: the model is none of them.
    """
    if isinstance(model, nn.Module):
        return LinenHandle(model, apply)
    if isinstance(model, flax_nnx.Module):
        return NnxHandle.of(model, apply)
    if callable(model) and not isinstance(model, type):
        if apply is not None:
            raise GraphError("apply= is for Flax modules; pass the function itself")
        return FunctionHandle(model)
    raise GraphError(
        f"expected a Flax module or a function of (params, inputs), found "
        f"{type(model).__name__}; pass module instances, not classes"
    )

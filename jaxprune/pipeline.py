"""trace, score, select, prune: the stages in order, no arithmetic of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxprune.errors import GraphError
from jaxprune.frameworks import handle_of
from jaxprune.graph import ChannelGraph, build


def trace(
    model: Any,
    variables: Any,
    x: Any,
    *,
    apply: Callable[..., Any] | None = None,
    ignore: Sequence[str] = (),
    strict: bool = False,
) -> ChannelGraph:
    """The channel graph of a model, traced abstractly: nothing of it is run.

    Args:
      model: a Flax Linen module, or a function (params, *inputs) -> outputs.
      variables: its variables; arrays, or ShapeDtypeStructs.
      x: an example input, or a tuple of the model's inputs; shapes are enough.
      apply: (model, variables, *inputs) -> outputs, for Linen modules whose
        inference call is not `model.apply(variables, x, train=False)`.
      ignore: name patterns of layers that keep all their channels.
      strict: raise at an operation without a rule, instead of freezing what it
        touches.

    Raises:
      GraphError: the model does not run on these variables and inputs.
    """
    handle = handle_of(model, apply)
    inputs = x if isinstance(x, tuple) else (x,)
    try:
        return build(handle, variables, inputs, ignore=ignore, strict=strict)
    except GraphError:
        raise
    except Exception as error:
        raise GraphError(
            f"{type(model).__name__} does not run on these variables and inputs: "
            f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
        ) from error

"""trace(): a model and an example input in, its channel graph out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jaxprune import trees
from jaxprune.checks import NAME, NAMES, check_values, either
from jaxprune.collection import uncollected
from jaxprune.errors import GraphError, first_line
from jaxprune.frameworks import NnxHandle, handle_of
from jaxprune.graph import ChannelGraph, Outputs, build


@uncollected()
def trace(
    model: Any,
    variables: Any,
    x: Any = None,
    *,
    apply: Callable[..., Any] | None = None,
    ignore: Sequence[str] = (),
    strict: bool = False,
    outputs: Outputs = None,
    replay: bool = False,
    tied: Sequence[Sequence[str]] = (),
) -> ChannelGraph:
    """The channel graph of a model, traced abstractly: nothing of it is run.

    `trace(model, variables, x)` for a Flax Linen module, `trace(model, x)` for an
    NNX object, `trace(function, params, x)` for a function (params, *inputs).

    Args:
      model: the module, the object or the function.
      variables: arrays, or ShapeDtypeStructs; left out for an NNX object, which
        holds them.
      x: an example input, or a tuple of the model's inputs; shapes are enough.
      apply: where the inference call is not `model.apply(variables, x,
        train=False)`: (model, variables, *inputs) -> outputs for Linen modules;
        where it is not `model(x)`: (model, *inputs) -> outputs for NNX objects.
      ignore: name patterns of layers that keep all their channels.
      strict: raise at an operation without a rule, instead of freezing what it
        touches.
      outputs: which outputs keep their shapes where a model returns several: name
        patterns ("logits"), or a function that picks from what the model returns;
        all of them by default. The others shrink with what they show.
      replay: for `shrink(replay=True)`, which it makes the default: channels shrink
        too along which the source computes positions or a table of constants (the
        pairs of a rotary embedding, sinusoidal positions), and unequal parts of one
        array (queries and fewer keys of one projection) shrink one by one. A module
        cannot follow there: its source would compute others for the smaller width,
        and cut at the numbers it states.
      tied: sets of groups, by name, that are made one group: channels of the same
        number stay or go together. For sources that state one number for the widths of
        several (queries, keys and values); `prune` finds such sets itself.

    Raises:
      ConfigError: `ignore` is no list of patterns.
      GraphError: the model does not run on these variables and inputs.
    """
    check_values({"ignore": ignore}, {"ignore": either(NAME, NAMES)})
    handle = handle_of(model, apply)
    if isinstance(handle, NnxHandle) and x is None:
        variables, x = handle.variables, variables
    inputs = x if isinstance(x, tuple) else (x,)
    variables = trees.arrays(variables)
    _only_arrays(variables)
    try:
        return build(
            handle,
            variables,
            inputs,
            ignore=ignore,
            strict=strict,
            outputs=outputs,
            replay=replay,
            tied=tied,
        )
    except GraphError:
        raise
    except Exception as error:
        raise GraphError(
            f"{type(model).__name__} does not run on these variables and inputs: "
            f"{type(error).__name__}: {first_line(error)}"
        ) from error


def _only_arrays(variables: Any) -> None:
    for path, leaf in trees.flatten(variables).items():
        if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
            raise GraphError(
                f"{path} is no array but a {type(leaf).__name__}; pass a tree of arrays "
                "alone and let the function hold the rest (Equinox: eqx.partition)"
            )

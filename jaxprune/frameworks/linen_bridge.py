"""NNX objects inside Linen modules (flax.nnx.bridge.ToLinen) at smaller widths."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import numpy as np
from flax import nnx
from flax.nnx import bridge

from jaxprune.frameworks.linen_paths import parts_of
from jaxprune.frameworks.nnx_resize import resize

Shape = tuple[int, ...]


def bridge_sizes(module: nn.Module, table: Mapping[str, Shape]) -> dict[str, Any]:
    """{"nnx_class": ...} that makes the object at the shapes in the table, as each call
    of such a module does; nothing for other modules.

    Args:
      table: shapes by collection, path of the Linen module and path in the object.
    """
    if not isinstance(module, bridge.ToLinen) or module.scope is None:
        return {}
    place = "/".join((*parts_of(module), ""))
    below = (name.partition("/")[2] for name in table)
    shapes = {
        name.removeprefix(place): shape
        for name, shape in zip(below, table.values(), strict=True)
        if name.startswith(place)
    }
    return {"nnx_class": _at(module.nnx_class, shapes, module.is_initializing())}


def _at(kind: Any, shapes: Mapping[str, Shape], kept: bool) -> Any:
    """The class as a function that makes smaller objects; kept: with values that are
    used, where apply puts its own in their place.
    """

    @functools.wraps(kind, updated=())
    def make(*args: Any, **kwargs: Any) -> Any:
        made = kind(*args, **kwargs)
        state = nnx.to_flat_state(nnx.state(made))
        for path, variable in state:
            shape = shapes.get("/".join(map(str, path)))
            if shape is None or not isinstance(variable, nnx.Variable):
                continue
            value = variable.get_value()
            if len(shape) != value.ndim:
                continue  # stacked by nn.scan or nn.vmap
            if kept:
                variable.set_value(value[tuple(map(slice, shape))])
            else:  # no operation that the original does not have
                variable.set_value(np.broadcast_to(np.zeros((), value.dtype), shape))
        nnx.update(made, nnx.from_flat_state(state))
        resize(made)
        return made

    return make

"""Small models of the patterns that decide a channel graph's worth: the register."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

# name: (module, input shape or shapes, names of groups that must be prunable)
PATTERNS: dict[str, tuple[Any, Any, tuple[str, ...]]] = {}
IMAGE, TOKENS = (2, 8, 8, 3), (2, 6, 8)


def pattern(*groups: str, x: Any = IMAGE) -> Callable[[Any], Any]:
    """Registers the body of a compact Linen module under the function's name."""

    def register(body: Callable[..., Any]) -> Callable[..., Any]:
        call = nn.compact(lambda self, *xs: body(*xs))
        call.__name__ = "__call__"
        kind = type(body.__name__.title(), (nn.Module,), {"__call__": call})
        PATTERNS[body.__name__] = (kind(), x, groups)
        return body

    return register


def conv(features: int, name: str, size: int = 3, **options: Any) -> nn.Conv:
    return nn.Conv(features, (size, size), name=name, **options)


def head(x: jax.Array) -> jax.Array:
    return nn.Dense(3, name="head")(x.mean(tuple(range(1, x.ndim - 1))))

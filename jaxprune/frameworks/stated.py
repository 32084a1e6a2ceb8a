"""Whole numbers that modules state as attributes: widths, numbers of heads.

An attribute is named by its path from the module, "num_heads", "config.hidden_size" or
"widths.2": the number may lie in a tuple, in a mapping or in an object of settings that
many modules share.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax import nnx

# Where a slim NNX object keeps what was set in it, for a record of a later round.
SETTINGS = "jaxprune_settings"
# How deep settings are looked into, and how many numbers a tuple of widths may have.
_DEPTH, _MOST = 4, 32
# What holds arrays and is no settings.
_HOLDERS = nn.Module | nnx.Pytree | nnx.Variable | nn.meta.AxisMetadata


def numbers_of(module: Any) -> dict[str, int]:
    """{name: number} of the attributes above 1, those of its submodules left out."""
    found = {}
    for name, value in vars(module).items():
        if name not in ("parent", "name", "scope", "_state", "_id", SETTINGS):
            found.update(_numbers(name, value, _DEPTH))
    return found


def with_number(value: Any, name: str, number: int) -> Any:
    """A copy of settings in which the number of that name is another.

    Raises:
      AttributeError, KeyError, IndexError: there is none of that name.
    """
    head, _, rest = name.partition(".")

    def new(old: Any) -> Any:
        return with_number(old, rest, number) if rest else type(old)(number)

    if isinstance(value, tuple | list):
        keys = _keys(value)
        if head not in keys:
            raise KeyError(head)
        pairs = zip(keys, value, strict=True)
        items = [new(item) if key == head else item for key, item in pairs]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if _is_mapping(value):
        return type(value)({**dict(value.items()), head: new(value[head])})
    copied = copy.copy(value)
    object.__setattr__(copied, head, new(getattr(value, head)))
    return copied


def merged(*settings: Iterable[Sequence[Any]]) -> tuple[tuple[Any, ...], ...]:
    """Rows (path, attribute, number) of several; the last of each attribute counts."""
    return tuple(
        {tuple(row[:2]): tuple(row) for rows in settings for row in rows}.values()
    )


def state(module: Any, name: str, number: int, put: Callable[..., None]) -> None:
    """Sets a number of a module; nothing where it has none of that name (yet).

    Args:
      put: (module, attribute, value) -> None, how this framework sets attributes.
    """
    head, _, rest = name.partition(".")
    try:
        value = getattr(module, head)
        put(module, head, with_number(value, rest, number) if rest else number)
    except (AttributeError, KeyError, IndexError):
        return


def _numbers(name: str, value: Any, depth: int) -> Iterator[tuple[str, int]]:
    if isinstance(value, bool) or depth == 0:
        return
    if isinstance(value, int | np.integer):
        if value > 1:
            yield name, int(value)
        return
    for key, inner in _parts(value):
        yield from _numbers(f"{name}.{key}", inner, depth - 1)


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """What a tuple, a mapping or an object of settings holds."""
    if isinstance(value, tuple | list):
        if len(value) <= _MOST:
            yield from zip(_keys(value), value, strict=True)
    elif _is_mapping(value):
        for key, inner in value.items():
            if isinstance(key, str) and "." not in key:
                yield key, inner
    elif _is_settings(value):
        yield from vars(value).items()


def _keys(value: Any) -> list[str]:
    return list(getattr(value, "_fields", map(str, range(len(value)))))


def _is_mapping(value: Any) -> bool:
    if isinstance(value, _HOLDERS):  # a module asked for an attribute may run its setup
        return False
    return isinstance(value, Mapping) or (
        callable(getattr(value, "items", None)) and hasattr(value, "__getitem__")
    )


def _is_settings(value: Any) -> bool:
    """An object that holds values and does nothing: a dataclass, a configuration."""
    held = isinstance(value, _HOLDERS | type | jax.Array | np.ndarray | np.dtype)
    return hasattr(value, "__dict__") and not (held or callable(value))

"""Recurrent cells outside `nn.RNN`: the first carry has the width that the cell has left.

A cell in a loop, or lifted by `nn.scan`, is asked for its carry before it is called.
Flax does not wrap `initialize_carry`, so no interceptor sees it: the method is replaced,
in Flax's cells and the user's, while a resized model runs.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn

NAME = "initialize_carry"
_LOCK = threading.Lock()
_running = 0
_own: dict[type[Any], Callable[..., Any]] = {}
_resize: contextvars.ContextVar[Callable[[nn.Module], None] | None]
_resize = contextvars.ContextVar("resize", default=None)


@contextlib.contextmanager
def carries_follow(resize: Callable[[nn.Module], None]) -> Iterator[None]:
    """A context in which every bound cell is resized before it makes a carry.

    Models that run in other threads keep their own `resize`, or none.
    """
    global _running
    with _LOCK:
        if not _running:
            for cell in set(_cells(nn.Module)):
                _own[cell] = vars(cell)[NAME]
                setattr(cell, NAME, _following(_own[cell]))
        _running += 1
    token = _resize.set(resize)
    try:
        yield
    finally:
        _resize.reset(token)
        with _LOCK:
            _running -= 1
            if not _running:
                while _own:
                    cell, method = _own.popitem()
                    setattr(cell, NAME, method)


def _cells(base: type[Any]) -> Iterator[type[Any]]:
    """The classes of modules below one that make carries by a method of their own."""
    for kind in base.__subclasses__():
        if isinstance(vars(kind).get(NAME), types.FunctionType):
            yield kind
        yield from _cells(kind)


def _following(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def initialize_carry(cell: nn.Module, *args: Any, **kwargs: Any) -> Any:
        resize = _resize.get()
        if resize is not None and cell.scope is not None:
            resize(cell)
        return method(cell, *args, **kwargs)

    return initialize_carry

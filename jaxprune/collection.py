"""Garbage collection, put off while programs are traced."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """No automatic collection while it lasts; also a decorator.

    A trace makes many objects that all live on. Looking through them again and again
    for garbage took a quarter of the time of `shrink`.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

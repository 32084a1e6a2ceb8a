"""The orders in which einsums of three arrays and more contract them.

JAX picks an order by the sizes, so that a smaller model may run other products than the
original, of the same result. To compare the two programs, one is traced with the orders
of the other.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import opt_einsum

# By subscripts: the order of each call that is met, in turn.
Orders = dict[str, list[Any]]

_CHOOSE: contextvars.ContextVar[Callable[[str, Any], Any]] = contextvars.ContextVar(
    "choose"
)


@contextlib.contextmanager
def recorded(orders: Orders) -> Iterator[None]:
    """While it lasts, orders that are picked are added to `orders`."""

    def choose(subscripts: str, pick: Any) -> Any:
        operands, steps = pick()
        if len(steps) > 1:
            path = [tuple(step[0]) for step in steps]
            orders.setdefault(subscripts, []).append(path)
        return operands, steps

    with _chosen_by(choose):
        yield


@contextlib.contextmanager
def pinned(orders: Orders) -> Iterator[None]:
    """While it lasts, calls with the subscripts of recorded ones take their orders."""
    left = {subscripts: iter(paths) for subscripts, paths in orders.items()}

    def choose(subscripts: str, pick: Any) -> Any:
        path = next(left.get(subscripts, iter(())), None)
        return pick() if path is None else pick(optimize=path)

    with _chosen_by(choose):
        yield


@contextlib.contextmanager
def _chosen_by(choose: Callable[[str, Any], Any]) -> Iterator[None]:
    # JAX calls opt_einsum's function by its module, whenever an einsum is traced.
    before = opt_einsum.contract_path

    def contract_path(*args: Any, **options: Any) -> Any:
        chooser = _CHOOSE.get(None)  # of this thread
        if chooser is None or not (args and isinstance(args[0], str)):
            return before(*args, **options)

        def pick(**fixed: Any) -> Any:
            return before(*args, **{**options, **fixed})

        return chooser(args[0], pick)

    token = _CHOOSE.set(choose)
    opt_einsum.contract_path = contract_path
    try:
        yield
    finally:
        opt_einsum.contract_path = before
        _CHOOSE.reset(token)

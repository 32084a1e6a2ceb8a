"""Shapes of one layer's arrays, of those that nn.scan or nn.vmap stacks."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

Shape = tuple[int, ...]


def unstacked(shape: Shape, stated: Shape, others: Sequence[Shape]) -> Shape | None:
    """The shape of one layer's array, of that of all layers under nn.scan or nn.vmap.

    The axes of the stack are told by their sizes, which all arrays of the layer have
    there, and by the sizes that the others have in common with the stated shape; the
    foremost of several. None if no choice leaves sizes within the stated ones.
    """
    best: tuple[tuple[int, int], Shape | None] = (-1, -1), None
    for stack in itertools.combinations(
        range(len(shape)), max(len(shape) - len(stated), 0)
    ):
        own = tuple(size for d, size in enumerate(shape) if d not in stack)
        pairs = list(zip(own, stated, strict=False))
        if len(own) != len(stated) or any(a > b for a, b in pairs):
            continue
        alike = all(
            len(other) > d and other[d] == shape[d] for other in others for d in stack
        )
        score = int(alike), sum(a == b for a, b in pairs)
        if score > best[0]:
            best = score, own
    return best[1]

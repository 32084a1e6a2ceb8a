"""What keeps channels whole: outputs, unread variables, what the user ignores."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.extend import core as jex

from jaxprune import trees
from jaxprune.errors import GraphError, first_line
from jaxprune.graph.atoms import Atoms, Classes
from jaxprune.graph.channels import Channels
from jaxprune.graph.interpret import Value, Walk

# Which outputs stay as they are: name patterns, or a function that picks from them.
Outputs = str | Sequence[str] | Callable[[Any], Any] | None

OUTPUT = "it is an output of the model"
ONE_OF_MANY = f"{OUTPUT}, and trace(outputs=) names those that keep their shapes"
UNUSED = "the forward pass does not read it"


@dataclass(frozen=True)
class Frozen:
    """An axis on which nothing can be removed, and why."""

    path: str
    axis: int
    size: int
    reason: str


def pin_unused(
    walk: Walk, closed: jex.ClosedJaxpr, values: Mapping[str, Value]
) -> None:
    """Freezes the variables that the program does not read."""
    read = {id(var) for eqn in closed.jaxpr.eqns for var in eqn.invars}
    read |= {id(var) for var in closed.jaxpr.outvars}
    for var, value in zip(closed.jaxpr.invars, values.values(), strict=False):
        if id(var) not in read:
            walk.pin(value.axes, UNUSED)


def fixed_outputs(returned: Any, outputs: Outputs) -> list[bool]:
    """Per flat output, whether it keeps its shape."""
    paths = list(trees.flatten(returned))
    if outputs is None:
        return [True] * len(paths)
    if callable(outputs):
        numbered = jax.tree.unflatten(jax.tree.structure(returned), range(len(paths)))
        try:
            picked = set(jax.tree.leaves(outputs(numbered)))
        except (AttributeError, IndexError, KeyError, TypeError) as error:
            raise GraphError(
                f"outputs= could not pick from what the model returns: "
                f"{type(error).__name__}: {first_line(error)}; the outputs are named "
                f"{paths[:6]}"
            ) from error
        return [number in picked for number in range(len(paths))]
    patterns = (outputs,) if isinstance(outputs, str) else tuple(outputs)
    fixed = [False] * len(paths)
    for pattern in patterns:
        hits = [
            fnmatch.fnmatchcase(path, pattern)
            or fnmatch.fnmatchcase(path, f"{pattern}/*")
            for path in paths
        ]
        if not any(hits):
            raise GraphError(
                f"outputs={pattern!r} matches none of the model's outputs; they are "
                f"named {paths[:6]}"
            )
        fixed = [a or b for a, b in zip(fixed, hits, strict=True)]
    return fixed


def pin_ignored(
    walk: Walk,
    values: Mapping[str, Value],
    ignore: Sequence[str],
    role_of: Mapping[tuple[str, int], Any],
) -> None:
    """Freezes what the patterns name: a leaf, or any part of a path.

    What a layer makes stays whole; what it reads may shrink.
    """
    for pattern in ignore:
        hits = [
            path
            for path in values
            if fnmatch.fnmatchcase(path, pattern)
            or fnmatch.fnmatchcase(path, f"{pattern}/*")
            or fnmatch.fnmatchcase(path, f"*/{pattern}/*")
        ]
        if not hits:
            raise GraphError(
                f"ignore={pattern!r} matches no leaf; leaves are named like "
                f"{list(values)[:3]}"
            )
        for path in hits:
            for dim, axis in enumerate(values[path].axes):
                if role_of.get((path, dim)) != "consumer":
                    walk.pin([axis], f"ignore={pattern!r}")


def frozen_axes(
    atoms: Atoms,
    classes: Classes,
    values: Mapping[str, Value],
    channels: Channels,
) -> tuple[Frozen, ...]:
    """Every axis on which nothing can go, with the reason that pins most of it."""
    reason: dict[int, str] = {}
    for axis, why in atoms.pins:
        for label in np.unique(classes.label[axis]):
            reason.setdefault(int(label), why)
    found = []
    for path, value in values.items():
        for dim, axis in enumerate(value.axes):
            if axis is None or (path, dim) in channels.places:
                continue
            labels = np.unique(classes.label[axis])
            whys = [reason[int(c)] for c in labels if int(c) in reason]
            text = max(set(whys), key=whys.count) if whys else _lonely(classes, labels)
            found.append(Frozen(path, dim, axis.size, text))
    return tuple(found)


def _lonely(classes: Classes, labels: np.ndarray) -> str:
    if classes.frozen[labels].any():
        return "it is part of a reshape whose other part is frozen"
    if labels.size > 1:
        return "no variable makes its channels: they are copies or constants"
    return "all its indices form one channel, which cannot be removed"

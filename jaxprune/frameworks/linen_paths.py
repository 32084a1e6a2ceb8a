"""Where a Linen module stands, as its variables are named."""

from __future__ import annotations

from typing import Any

import flax.linen as nn

from jaxprune import trees

# The field of `linen_slim.Resized` that holds the user's module. Modules that are fields
# of that one get their scopes before the two share theirs, and keep it in their paths.
WRAPPED = "jaxprune_module"


def parts_of(module: nn.Module) -> tuple[str, ...]:
    """The names on the way from the root to a module; none where it is not bound."""
    path = () if module.scope is None else module.scope.path
    return tuple(str(part) for part in path if part != WRAPPED)


def path_of(module: nn.Module) -> str:
    return "/".join(parts_of(module))


def paths_within(found: dict[str, Any], variables: Any) -> dict[str, Any]:
    """What was found by path, with the names taken off that stand in front of those of
    the variables: of modules around the one that they belong to.

    As many names as let most paths be those of modules with variables.
    """
    known = set()
    for leaf in trees.flatten(variables):
        parts = leaf.split("/")[1:-1]
        known |= {"/".join(parts[: k + 1]) for k in range(len(parts))}
    split = {path: path.split("/") if path else [] for path in found}

    def within(front: int) -> dict[str, Any]:
        return {
            "/".join(parts[front:]): found[path]
            for path, parts in split.items()
            if len(parts) >= front
        }

    deepest = max(map(len, split.values()), default=0)
    return max(map(within, range(deepest + 1)), key=lambda d: len(known & d.keys()))

"""Read and write the leaves of any pytree by name, such as "params/conv0/kernel"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxprune.errors import GraphError


def _name(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def path_name(path: tuple[Any, ...]) -> str:
    """A key path of jax.tree_util as a name with slashes."""
    return "/".join(_name(entry) for entry in path)


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by name, in the tree's own order."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {path_name(path): leaf for path, leaf in leaves}


def of_dicts(tree: Any) -> bool:
    """Whether all of its inner nodes are dicts, or other mappings."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    keys = (entry for path, _ in leaves for entry in path)
    return all(isinstance(entry, jax.tree_util.DictKey) for entry in keys)


def arrays(tree: Any) -> Any:
    """The tree with arrays for the Python numbers in it."""
    number = bool | int | float | complex
    return jax.tree.map(
        lambda leaf: jnp.asarray(leaf) if isinstance(leaf, number) else leaf, tree
    )


def unflatten_like(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """`tree` with every leaf replaced by the one of that name in `leaves`.

    Raises:
      GraphError: a leaf of `tree` is missing from `leaves`.
    """
    flat, structure = jax.tree_util.tree_flatten_with_path(tree)
    names = [path_name(path) for path, _ in flat]
    missing = [name for name in names if name not in leaves]
    if missing:
        raise GraphError(
            f"{len(missing)} leaves are missing, the first {missing[0]!r}; found "
            f"{sorted(leaves)[:5]} ...; pass the tree the names were taken from"
        )
    return jax.tree_util.tree_unflatten(structure, [leaves[name] for name in names])


def replace(tree: Any, leaves: Mapping[str, Any]) -> Any:
    """`tree` with the named leaves replaced; the others are kept as they are.

    Raises:
      GraphError: a name is not in `tree`.
    """
    current = flatten(tree)
    unknown = [name for name in leaves if name not in current]
    if unknown:
        raise GraphError(
            f"the tree has no leaf {unknown[0]!r}; it has {list(current)[:5]} ..."
        )
    return unflatten_like(tree, {**current, **leaves})

"""Kept indices, old -> new, of every array: data that can be stored and composed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from jaxprune import trees
from jaxprune.errors import PlanError
from jaxprune.graph import ChannelGraph
from jaxprune.records import Plan
from jaxprune.slicing import keep_indices, take


@dataclass(frozen=True, eq=False)
class KeptIndices(Mapping[str, Mapping[int, np.ndarray]]):
    """{leaf path: {axis: sorted indices of the ORIGINAL array that were kept}}.

    Only axes that lost something are listed. `sizes` holds the original length of
    each listed axis.
    """

    kept: Mapping[str, Mapping[int, np.ndarray]]
    sizes: Mapping[str, Mapping[int, int]]

    def __getitem__(self, path: str) -> Mapping[int, np.ndarray]:
        return self.kept[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    def then(self, later: KeptIndices) -> KeptIndices:
        """The indices of the first arrays that remain after a second round.

        Raises:
          PlanError: the second round does not start from what this one left.
        """
        kept = {path: dict(axes) for path, axes in self.kept.items()}
        sizes = {path: dict(axes) for path, axes in self.sizes.items()}
        for path, axes in later.items():
            for axis, indices in axes.items():
                before = kept.get(path, {}).get(axis)
                size = later.sizes[path][axis]
                if before is None:
                    kept.setdefault(path, {})[axis] = indices
                    sizes.setdefault(path, {})[axis] = size
                elif before.size != size:
                    raise PlanError(
                        f"{path} axis {axis}: expected a second round on the "
                        f"{before.size} indices that the first one kept, found one on "
                        f"{size}; compose rounds in the order they were made"
                    )
                else:
                    kept[path][axis] = before[indices]
        return KeptIndices(kept, sizes)

    def masks(self) -> dict[str, dict[int, np.ndarray]]:
        """{path: {axis: bool array}}, True where an index is kept."""
        found: dict[str, dict[int, np.ndarray]] = {}
        for path, axes in self.kept.items():
            for axis, indices in axes.items():
                mask = np.zeros(self.sizes[path][axis], bool)
                mask[indices] = True
                found.setdefault(path, {})[axis] = mask
        return found

    @classmethod
    def from_masks(cls, masks: Mapping[str, Mapping[int, Any]]) -> KeptIndices:
        """Inverse of `masks`."""
        return cls(
            {p: {a: np.flatnonzero(m) for a, m in x.items()} for p, x in masks.items()},
            {p: {a: len(m) for a, m in x.items()} for p, x in masks.items()},
        )

    def take(self, tree: Any) -> Any:
        """A tree of the original shapes, sliced; leaves are found by name.

        Raises:
          PlanError: a listed axis has another length than the original's, or no leaf
            has a listed name.
        """
        leaves = trees.flatten(tree)
        if self.kept and not leaves.keys() & self.kept.keys():
            raise PlanError(
                f"expected a tree with {next(iter(self.kept))}, found "
                f"{list(leaves)[:3]}; pass the whole variables, with the collections "
                "that were traced"
            )
        for path, axes in self.kept.items():
            shape = jax.numpy.shape(leaves[path]) if path in leaves else None
            for axis, size in self.sizes[path].items():
                if shape is not None and (axis >= len(shape) or shape[axis] != size):
                    raise PlanError(
                        f"{path}: expected length {size} on axis {axis}, found shape "
                        f"{shape}; these are not the arrays the indices were made for"
                    )
            if shape is not None:
                leaves[path] = take(leaves[path], axes)
        return trees.unflatten_like(tree, leaves)

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form: {path: {axis: {"size": n, "kept": [indices]}}}."""
        return {
            path: {
                str(axis): {
                    "size": int(self.sizes[path][axis]),
                    "kept": [int(i) for i in indices],
                }
                for axis, indices in axes.items()
            }
            for path, axes in self.kept.items()
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> KeptIndices:
        """Inverse of `to_json`."""
        return cls(
            {
                path: {int(a): np.asarray(r["kept"], np.int64) for a, r in axes.items()}
                for path, axes in record.items()
            },
            {
                path: {int(a): int(r["size"]) for a, r in axes.items()}
                for path, axes in record.items()
            },
        )


def kept_indices(graph: ChannelGraph, plan: Plan | Mapping[str, Any]) -> KeptIndices:
    """Which indices of every array of the variables a plan keeps.

    Pass `slim.plan`: what was done, groups that were left whole included.

    Raises:
      PlanError: the plan is not for this graph, or empties an axis.
    """
    kept, traced = keep_indices(graph, plan), trees.flatten(graph.variables)
    sizes = {
        path: {axis: int(traced[path].shape[axis]) for axis in axes}
        for path, axes in kept.items()
    }
    return KeptIndices(kept, sizes)

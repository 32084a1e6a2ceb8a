"""Frozen records that the stages share: Slot, Group, Plan, Budget, Slim."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from jaxprune.errors import PlanError

Role = Literal["producer", "consumer", "other"]


@dataclass(frozen=True, eq=False)
class Slot:
    """One axis of one array, with the indices on it that belong to each channel.

    Attributes:
      path: name of the leaf in the variables tree, such as "params/conv0/kernel".
      axis: the axis of that leaf.
      index: int array (C, m): row c holds the m indices of channel c, ascending.
      role: "producer" on an output axis of a kernel, "consumer" on a contracted
        axis, "other" for what rides along (biases, norm scales, statistics).
    """

    path: str
    axis: int
    index: np.ndarray
    role: Role = "other"


@dataclass(frozen=True, eq=False)
class Group:
    """Channels with the same list of slots, ranked against each other.

    Attributes:
      name: unique within the graph and stable for a given model, the first
        producing layer, such as "conv0" or "block1/mlp/Dense_0".
      size: number of channels C.
      slots: every place a channel lives.
      units: int array (C,), the ids of the channels in the graph's unit table.
      linked: groups of the same mark keep alike shares, because the model's source
        derives the width of one from that of another; "" for one that stands alone.
    """

    name: str
    size: int
    slots: tuple[Slot, ...]
    units: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    linked: str = ""

    @property
    def producers(self) -> tuple[Slot, ...]:
        return tuple(s for s in self.slots if s.role == "producer")

    @property
    def consumers(self) -> tuple[Slot, ...]:
        return tuple(s for s in self.slots if s.role == "consumer")


@dataclass(frozen=True, eq=False)
class Plan(Mapping[str, np.ndarray]):
    """Per group, the sorted indices that are KEPT.

    A mapping from group name to an int64 array; `sizes` holds the full width of
    each group, so that a plan converts to masks and back on its own.
    """

    keep: Mapping[str, np.ndarray]
    sizes: Mapping[str, int]

    def __post_init__(self) -> None:
        problems, clean = [], {}
        for name, indices in self.keep.items():
            kept = np.asarray(indices)
            if name not in self.sizes:
                problems.append(f"group {name!r}: its size is not given")
                continue
            size = int(self.sizes[name])
            if kept.ndim != 1 or (kept.size and kept.dtype.kind not in "iu"):
                problems.append(
                    f"group {name!r}: expected a list of integer indices, found "
                    f"{kept.dtype} of shape {kept.shape}; masks go through "
                    "Plan.from_masks"
                )
                continue
            kept = kept.astype(np.int64)
            if not (kept[1:] > kept[:-1]).all():
                kept = np.unique(kept)
            if kept.size != np.asarray(indices).size:
                problems.append(f"group {name!r}: the same index is listed twice")
            if kept.size and not (0 <= kept[0] and kept[-1] < size):
                problems.append(
                    f"group {name!r}: indices {kept[0]}..{kept[-1]} do not lie in "
                    f"0..{size - 1}"
                )
            if not kept.size:
                problems.append(
                    f"group {name!r}: nothing of its {size} channels is kept; "
                    "keep at least one"
                )
            clean[name] = kept
        if problems:
            raise PlanError("this plan is not valid:\n  " + "\n  ".join(problems))
        object.__setattr__(self, "keep", clean)
        object.__setattr__(self, "sizes", {n: int(s) for n, s in self.sizes.items()})

    def __getitem__(self, name: str) -> np.ndarray:
        return self.keep[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.keep)

    def __len__(self) -> int:
        return len(self.keep)

    def masks(self) -> dict[str, np.ndarray]:
        """Boolean (C,) per group, True where the channel is kept."""
        masks = {}
        for name, kept in self.keep.items():
            masks[name] = np.zeros(self.sizes[name], bool)
            masks[name][kept] = True
        return masks

    @classmethod
    def from_masks(cls, masks: Mapping[str, Any]) -> Plan:
        """The plan that keeps where a mask is True; inverse of `masks`."""
        masks = {name: np.asarray(mask, bool) for name, mask in masks.items()}
        return cls(
            {name: np.flatnonzero(mask) for name, mask in masks.items()},
            {name: mask.size for name, mask in masks.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready form: {group: {"size": C, "kept": [indices]}}."""
        return {
            name: {"size": self.sizes[name], "kept": [int(i) for i in kept]}
            for name, kept in self.keep.items()
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Plan:
        """Inverse of `to_json`."""
        return cls(
            {name: np.asarray(r["kept"], np.int64) for name, r in record.items()},
            {name: r["size"] for name, r in record.items()},
        )


@dataclass(frozen=True)
class Budget:
    """What must remain, as a fraction of the whole: 0.5 keeps half.

    Attributes:
      kind: "macs", "params", "bytes", "latency_ms" (absolute) or "keep" (channels).
      value: a fraction in (0, 1], or milliseconds for "latency_ms".
    """

    kind: Literal["macs", "params", "bytes", "latency_ms", "keep"]
    value: float


@dataclass(frozen=True, eq=False)
class Slim:
    """A pruned model.

    Attributes:
      model: the smaller model, of the framework the original came from.
      variables: its variables tree (for NNX the state; it is also in `model`).
      plan: what was kept of the original.
      report: JSON-ready record: method, asked, achieved, groups, verify error.
    """

    model: Any
    variables: Any
    plan: Plan
    report: Mapping[str, Any] = field(default_factory=dict)

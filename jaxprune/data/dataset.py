"""Frozen records of a data set: where images come from and how they are prepared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from jaxprune.errors import DataError

Augment = Literal["none", "crop", "crop_flip"]


class Transform(NamedTuple):
    """How uint8 images become network input: (x / 255 - mean) / std per channel.

    Attributes:
      mean: per channel, on the scale 0 to 1.
      std: per channel, on the scale 0 to 1.
      augment: for training only. "crop" pads by an eighth of the height (4 pixels of
        32) and crops at random, "crop_flip" also mirrors half of the images.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment = "none"


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images, in memory or decoded on demand.

    Attributes:
      images: uint8 (N, H, W, C), or for data that do not fit in memory a sequence
        whose item i is the pair (uint8 (H, W, C), label).
      labels: int32 (N,), or None where `images` is such a sequence.
      rows: int64 (n,), the rows of `images` that belong to this split.
      transform: how the images are prepared.
    """

    images: np.ndarray | Sequence[tuple[np.ndarray, int]]
    labels: np.ndarray | None
    rows: np.ndarray
    transform: Transform

    def __len__(self) -> int:
        return int(self.rows.size)

    @property
    def in_memory(self) -> bool:
        return isinstance(self.images, np.ndarray)

    def take(self, count: int, *, seed: int = 0) -> Split:
        """`count` examples chosen at random by `seed`, all of them where fewer exist."""
        order = np.random.default_rng([seed, 1]).permutation(self.rows)
        return Split(self.images, self.labels, order[:count], self.transform)


@dataclass(frozen=True, eq=False)
class Dataset:
    """A classification data set with separate training, validation and test examples.

    Attributes:
      name: as it was asked for.
      train: examples for training and calibration.
      validation: carved from the training examples, None where none were asked for.
      test: held out; nothing but the final evaluation reads it.
      num_classes: number of classes.
      image_shape: (H, W, C).
    """

    name: str
    train: Split
    validation: Split | None
    test: Split
    num_classes: int
    image_shape: tuple[int, int, int]


def carve(split: Split, *, validation: float, seed: int) -> tuple[Split, Split]:
    """(train, validation): disjoint parts of `split`, the same for the same seed.

    Args:
      split: the examples to divide.
      validation: a number of examples, or a fraction when below 1.
      seed: picks which examples.

    Raises:
      DataError: nothing would be left to train on.
    """
    total = len(split)
    count = round(validation * total) if validation < 1 else int(validation)
    if not 0 <= count < total:
        raise DataError(
            f"validation={validation} leaves nothing to train on: there are {total} "
            "training examples; ask for fewer, or for a fraction below 1"
        )
    order = np.random.default_rng([seed, 0]).permutation(split.rows)
    parts = np.sort(order[count:]), np.sort(order[:count])
    train, held_out = (
        Split(split.images, split.labels, rows, split.transform) for rows in parts
    )
    return train, held_out

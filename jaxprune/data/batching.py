"""Deterministic batches: the same (seed, epoch) gives the same examples and crops."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune.data.dataset import Split, Transform
from jaxprune.errors import DataError


def _crop(x: jax.Array, key: jax.Array) -> jax.Array:
    """`x` padded with zeros and cropped to its own size at one random place each."""
    n, height, width, channels = x.shape
    pad = max(height // 8, 1)
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    corners = jax.random.randint(key, (n, 2), 0, 2 * pad + 1)

    def one(image: jax.Array, corner: jax.Array) -> jax.Array:
        start = (corner[0], corner[1], 0)
        return jax.lax.dynamic_slice(image, start, (height, width, channels))

    return jax.vmap(one)(padded, corners)


@functools.partial(jax.jit, static_argnames="transform")
def prepare(
    x: jax.Array, *, transform: Transform, key: jax.Array | None = None
) -> jax.Array:
    """Network input float32 (B, H, W, C) of images uint8 (B, H, W, C).

    With a `key` the images are augmented as `transform.augment` says (pad and crop,
    mirror; He et al. 2016, arXiv:1512.03385, section 4.2), without one never. Zeros
    are padded after normalisation, as there.
    """
    mean = jnp.asarray(transform.mean, jnp.float32)
    std = jnp.asarray(transform.std, jnp.float32)
    x = (x.astype(jnp.float32) / 255.0 - mean) / std
    if key is None or transform.augment == "none":
        return x
    crop_key, flip_key = jax.random.split(key)
    x = _crop(x, crop_key)
    if transform.augment == "crop_flip":
        mirrored = jax.random.bernoulli(flip_key, 0.5, (x.shape[0], 1, 1, 1))
        x = jnp.where(mirrored, x[:, :, ::-1], x)
    return x


def batch_key(seed: int, epoch: int, index: int) -> jax.Array:
    """The PRNG key of one batch, a function of its three arguments alone."""
    key = jax.random.key(seed)
    return jax.random.fold_in(jax.random.fold_in(key, epoch), index)


class _Ordered:
    """The examples of a split in a given order, for grain."""

    def __init__(self, split: Split, order: np.ndarray) -> None:
        self._images, self._order = split.images, order

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: Any) -> tuple[np.ndarray, int]:
        return self._images[int(self._order[int(index)])]


def _streamed(split: Split, order: np.ndarray, size: int) -> Iterator[Any]:
    """Batches of `size` decoded ahead of time by grain's threads."""
    try:
        import grain
    except ImportError as error:
        raise DataError(
            "these images do not fit in memory and are streamed by grain, which is "
            "not installed; run pip install 'jaxprune[tfds]'"
        ) from error
    options = grain.ReadOptions(num_threads=16, prefetch_buffer_size=2 * size)
    examples = iter(
        grain.MapDataset.source(_Ordered(split, order)).to_iter_dataset(options)
    )
    for first in range(0, len(order), size):
        count = min(size, len(order) - first)
        images, labels = zip(*(next(examples) for _ in range(count)), strict=True)
        yield np.stack(images), np.asarray(labels, np.int32)


def raw_batches(
    split: Split,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = False,
    drop_remainder: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches (x uint8 (B, H, W, C), y int32 (B,)), as they are stored.

    Args:
      split: the examples.
      batch_size: B over all hosts; the last batch may be smaller.
      seed: with `epoch`, decides the order when `shuffle` is set.
      epoch: number of the pass.
      shuffle: take the examples in random order.
      drop_remainder: leave out a last batch smaller than B.
      shard: (index of this host, number of hosts); each host gets its own B / hosts
        rows of every batch.

    Raises:
      DataError: the split is empty, or smaller than a batch when that is dropped.
    """
    host, hosts = shard
    if not len(split) or (drop_remainder and len(split) < batch_size):
        raise DataError(
            f"the split has {len(split)} examples, fewer than one batch of "
            f"{batch_size}; choose a smaller batch_size or more examples"
        )
    order = split.rows
    if shuffle:
        order = np.random.default_rng([seed, epoch]).permutation(order)
    if drop_remainder or hosts > 1:
        order = order[: len(order) // batch_size * batch_size]
    if hosts > 1:
        order = order.reshape(-1, hosts, batch_size // hosts)[:, host].reshape(-1)
    size = batch_size // hosts
    if not split.in_memory:
        yield from _streamed(split, order, size)
        return
    images, labels = split.images, split.labels
    assert isinstance(images, np.ndarray) and labels is not None
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        yield images[rows], labels[rows]


def batches(
    split: Split,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    augment: bool = False,
    shuffle: bool = False,
    drop_remainder: bool = False,
) -> Iterator[tuple[jax.Array, np.ndarray]]:
    """Batches (x float32 (B, H, W, C) normalised, y int32 (B,)) of one pass.

    Options as in `raw_batches`; `augment` applies the transform's augmentation. Two
    calls with the same `seed` and `epoch` give equal arrays.
    """
    raw = raw_batches(
        split,
        batch_size,
        seed=seed,
        epoch=epoch,
        shuffle=shuffle,
        drop_remainder=drop_remainder,
    )
    for index, (x, y) in enumerate(raw):
        key = batch_key(seed, epoch, index) if augment else None
        yield prepare(x, transform=split.transform, key=key), y

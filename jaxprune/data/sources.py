"""Opens data sets by name: digits, synthetic, npz:PATH, folder:PATH, or a TFDS name."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxprune.data.dataset import Augment, Dataset, Split, Transform, carve
from jaxprune.errors import DataError

Progress = Callable[[str, int, int], None]

# Channel statistics of the training images on the scale 0 to 1. CIFAR's and
# ImageNet's are the published ones; digits' were measured on its training split.
_STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagenet2012": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "digits": ((0.305,), (0.376,)),
}


class Raw(NamedTuple):
    """What a source yields: images and labels of both splits, before preparation.

    `train` and `test` are (images, labels) as in `Split`; `stem` names the channel
    statistics, `augment` the augmentation that suits the images.
    """

    train: tuple
    test: tuple
    num_classes: int
    image_shape: tuple[int, int, int]
    stem: str
    augment: Augment


def _digits() -> Raw:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn, which is not installed; run "
            "pip install 'jaxprune[digits]'"
        ) from error
    scans: Any = load_digits()
    x = np.round(scans.images[..., None] * (255 / 16)).astype(np.uint8)
    y = scans.target.astype(np.int32)
    # The file is ordered by writer. Every fifth scan of a fixed shuffle is a test.
    order = np.random.default_rng(0).permutation(len(y))
    test, train = order[::5], np.delete(order, np.s_[::5])
    return Raw(
        (x[train], y[train]), (x[test], y[test]), 10, (8, 8, 1), "digits", "crop"
    )


def _synthetic(size: int) -> Raw:
    """Ten random textures under noise: learnable, and the same on every machine."""
    rng = np.random.default_rng(0)
    textures = rng.integers(0, 256, (10, size, size, 3))

    def draw(count: int) -> tuple[np.ndarray, np.ndarray]:
        y = rng.integers(0, 10, count).astype(np.int32)
        noise = rng.integers(0, 256, (count, size, size, 3))
        return ((textures[y] + 2 * noise) // 3).astype(np.uint8), y

    return Raw(draw(2000), draw(500), 10, (size, size, 3), "synthetic", "none")


def _npz_split(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            x, y = arrays["x"], arrays["y"]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(
            f"cannot read {path}: {error}; expected an npz file with arrays x and y"
        ) from error
    if x.dtype != np.uint8 or x.ndim != 4 or y.shape != x.shape[:1]:
        raise DataError(
            f"{path}: expected x uint8 (N, H, W, C) and y (N,), found x {x.dtype} "
            f"{x.shape} and y {y.dtype} {y.shape}; convert the images to uint8"
        )
    return x, y.astype(np.int32)


def _npz(path: str) -> Raw:
    root = pathlib.Path(path).expanduser()
    train, test = _npz_split(root / "train.npz"), _npz_split(root / "test.npz")
    if train[0].shape[1:] != test[0].shape[1:]:
        raise DataError(
            f"{root}: train images are {train[0].shape[1:]}, test images are "
            f"{test[0].shape[1:]}; they must have one shape"
        )
    classes = int(max(train[1].max(), test[1].max())) + 1
    shape = train[0].shape[1:]
    return Raw(train, test, classes, shape, root.name, "crop_flip")


def _resize(images: np.ndarray, size: int) -> np.ndarray:
    """uint8 (N, size, size, C), bilinear."""
    n, _, _, channels = images.shape
    parts = [
        jax.image.resize(
            part.astype(np.float32), (len(part), size, size, channels), "bilinear"
        )
        for part in np.array_split(images, max(n // 1000, 1))
    ]
    resized = np.concatenate([np.asarray(part) for part in parts])
    return np.clip(np.round(resized), 0, 255).astype(np.uint8)


def _resized(raw: Raw, size: int) -> Raw:
    if raw.image_shape[:2] == (size, size):
        return raw
    train, test = (
        (_resize(images, size), labels) for images, labels in (raw.train, raw.test)
    )
    shape = (size, size, raw.image_shape[2])
    return raw._replace(train=train, test=test, image_shape=shape)


def _statistics(raw: Raw) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The channel statistics of a known data set, else those of a training sample."""
    if raw.stem in _STATISTICS:
        return _STATISTICS[raw.stem]
    images = raw.train[0]
    if not isinstance(images, np.ndarray):
        return _STATISTICS["imagenet2012"]
    sample = images[:: max(len(images) // 5000, 1)].astype(np.float64) / 255
    mean, std = sample.mean((0, 1, 2)), sample.std((0, 1, 2))
    # A constant channel is only shifted, not blown up.
    std = np.where(std > 1e-3, std, 1.0)
    return tuple(map(float, mean.round(4))), tuple(map(float, std.round(4)))


def load(
    name: str,
    *,
    data_dir: str | None = None,
    validation: float = 0.1,
    image_size: int | None = None,
    train_examples: int | None = None,
    test_examples: int | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> Dataset:
    """The data set of that name, its validation part carved from the training split.

    Args:
      name: "digits", "synthetic", "npz:PATH" (train.npz and test.npz with x uint8
        (N, H, W, C) and y (N,)), "folder:PATH" (train/CLASS/*.jpg, test/CLASS/*.jpg),
        or the name of a TFDS data set prepared in array_record format, such as
        "cifar10" or "cifar10:3.0.2".
      data_dir: where TFDS data sets are; by default $TFDS_DATA_DIR, else
        ~/tensorflow_datasets.
      validation: a number of training examples to hold out, or a fraction below 1.
      image_size: resize to this height and width.
      train_examples: use only this many training examples, in the stored order.
      test_examples: use only this many test examples, in the stored order.
      seed: picks the validation examples.
      on_progress: called with (stage, done, total) while images are decoded.

    Raises:
      DataError: the data are missing, damaged or not images with integer labels.
    """
    from jaxprune.data.decoding import folder, prepared

    kind, _, path = name.partition(":")
    limits = (train_examples, test_examples)
    if kind == "digits":
        raw = _digits()
    elif kind == "synthetic":
        raw = _synthetic(image_size or 32)
    elif kind == "npz":
        raw = _npz(path)
    elif kind == "folder":
        raw = folder(path, size=image_size, limits=limits, on_progress=on_progress)
    else:
        raw = prepared(
            name, data_dir, size=image_size, limits=limits, on_progress=on_progress
        )
    if isinstance(raw.train[0], np.ndarray) and image_size is not None:
        raw = _resized(raw, image_size)
    transform = Transform(*_statistics(raw), raw.augment)
    full, test = (
        Split(images, labels, np.arange(len(images))[:limit], transform)
        for (images, labels), limit in zip((raw.train, raw.test), limits, strict=True)
    )
    train, held_out = carve(full, validation=validation, seed=seed)
    return Dataset(
        name=name,
        train=train,
        validation=held_out if len(held_out) else None,
        test=test,
        num_classes=raw.num_classes,
        image_shape=raw.image_shape,
    )

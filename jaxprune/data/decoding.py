"""Data sets that are stored as compressed images: TFDS directories and folders."""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxprune.data.sources import Progress, Raw
from jaxprune.errors import DataError, first_line

# Decoded images up to this size are held in memory, larger sets are streamed.
MEMORY_LIMIT_BYTES = 4 << 30
_INSTALL = "run pip install 'jaxprune[tfds]'"
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}

Limits = tuple[int | None, int | None]


def fit_square(image: np.ndarray, size: int | None) -> np.ndarray:
    """uint8 (size, size, C): the centre of `image` with its short side at `size`."""
    if size is None or image.shape[:2] == (size, size):
        return image
    from PIL import Image

    height, width = image.shape[:2]
    scale = size / min(height, width)
    shape = (max(round(width * scale), size), max(round(height * scale), size))
    picture = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    resized = np.asarray(picture.resize(shape, Image.Resampling.BILINEAR))
    top, left = (shape[1] - size) // 2, (shape[0] - size) // 2
    crop = resized[top : top + size, left : left + size]
    return crop.reshape(size, size, image.shape[-1])


def _picture(data: pathlib.Path | io.BytesIO, mode: str) -> np.ndarray:
    """uint8 (H, W, C) of an encoded image; `mode` is Pillow's, "L" or "RGB"."""
    from PIL import Image

    with Image.open(data) as picture:
        image = np.asarray(picture.convert(mode))
    return image[..., None] if image.ndim == 2 else image


class _Records(Sequence):
    """Decoded (image, label) pairs of a TFDS data source that skips decoding.

    Reading many records at once and decoding with Pillow is three times as fast as
    the source's own decoder (measured on CIFAR-10).
    """

    def __init__(self, source, mode: str, size: int | None) -> None:
        self._source, self._mode, self._size = source, mode, size

    def __len__(self) -> int:
        return len(self._source)

    def _pair(self, record) -> tuple[np.ndarray, int]:
        image = _picture(io.BytesIO(record["image"]), self._mode)
        return fit_square(image, self._size), int(record["label"])

    def __getitem__(self, index):
        return self._pair(self._source[int(index)])

    def many(self, first: int, last: int, pool: ThreadPoolExecutor):
        """Pairs first .. last - 1."""
        records = self._source.__getitems__(list(range(first, last)))
        return list(pool.map(self._pair, records))


class _Files(Sequence):
    """Decoded (image, label) pairs of image files."""

    def __init__(self, files: list[tuple[pathlib.Path, int]], size: int | None):
        self._files, self._size = files, size

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index):
        path, label = self._files[int(index)]
        try:
            return fit_square(_picture(path, "RGB"), self._size), label
        except OSError as error:
            raise DataError(
                f"cannot decode {path}: {error}; remove the file or replace it"
            ) from error

    def many(self, first: int, last: int, pool: ThreadPoolExecutor):
        """Pairs first .. last - 1."""
        return list(pool.map(self.__getitem__, range(first, last)))


def _decode(
    records: _Records | _Files,
    limit: int | None,
    stage: str,
    on_progress: Progress | None,
) -> tuple[np.ndarray, np.ndarray]:
    """All `records`, or the first `limit`, as (uint8 (N, H, W, C), int32 (N,))."""
    total = min(len(records), limit or len(records))
    images: list[np.ndarray] = []
    labels = np.zeros(total, np.int32)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        chunk = 2000
        for first in range(0, total, chunk):
            last = min(first + chunk, total)
            pairs = records.many(first, last, pool)
            shapes = {image.shape for image, _ in pairs} | {
                image.shape for image in images[:1]
            }
            if len(shapes) > 1:
                raise DataError(
                    f"images of different shapes, such as {sorted(shapes)[:2]}; set "
                    "image_size so that they are resized"
                )
            images += [image for image, _ in pairs]
            labels[first:last] = [label for _, label in pairs]
            if on_progress is not None:
                on_progress(stage, last, total)
    return np.stack(images), labels


def _materialise(
    train: _Records | _Files,
    test: _Records | _Files,
    limits: Limits,
    on_progress: Progress | None,
) -> tuple[tuple, tuple]:
    """Both splits decoded where they fit in memory, else as they are."""
    image, _ = train[0]
    counts = [
        min(len(records), limit or len(records))
        for records, limit in zip((train, test), limits, strict=True)
    ]
    if image.nbytes * sum(counts) > MEMORY_LIMIT_BYTES:
        return (train, None), (test, None)
    return (
        _decode(train, limits[0], "decode train", on_progress),
        _decode(test, limits[1], "decode test", on_progress),
    )


def _find_prepared(name: str, data_dir: str | None) -> pathlib.Path:
    """The directory of the newest prepared version of a TFDS data set."""
    default = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    root = pathlib.Path(data_dir or default).expanduser()
    base, _, version = name.partition(":")
    marks = root.joinpath(base).glob("**/dataset_info.json")
    found = [m.parent for m in marks if version in ("", m.parent.name)]
    if len({path.parent for path in found}) > 1:
        configs = sorted({path.parent.name for path in found})
        raise DataError(
            f"data set {base!r} under {root} has the configurations {configs}; name "
            f"one, such as {base}/{configs[0]!s}"
        )
    if found:
        return max(found, key=lambda p: [int(n) for n in p.name.split(".")])
    near = {
        str(m.parent.parent.relative_to(root)) for m in root.glob("*/**/features.json")
    }
    here = f"it holds {', '.join(sorted(near))}" if near else "it holds none"
    if not root.is_dir():
        here = "there is no such directory"
    raise DataError(
        f"no prepared TFDS data set {name!r} under {root}: {here}; point data_dir at "
        "a directory prepared with tfds.builder(NAME, file_format='array_record')"
        ".download_and_prepare(), or use data=digits, which needs none"
    )


def prepared(
    name: str,
    data_dir: str | None,
    *,
    size: int | None,
    limits: Limits,
    on_progress: Progress | None,
) -> Raw:
    """A prepared TFDS data set; the builder is never asked to download."""
    path = _find_prepared(name, data_dir)
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise DataError(f"TFDS is not installed ({error}); {_INSTALL}") from error
    try:
        tfds: Any = tensorflow_datasets  # Its annotations leave much out.
        builder = tfds.builder_from_directory(str(path))
        splits = builder.info.splits
        held_out = "test" if "test" in splits else "validation"
        skip = {"image": tfds.decode.SkipDecoding()}
        sources = [
            builder.as_data_source(split, decoders=skip)
            for split in ("train", held_out)
        ]
    # TFDS raises many types here, with long texts; the first line says enough.
    except Exception as error:
        raise DataError(
            f"cannot open the TFDS data set in {path}: {first_line(error)}; it must be in "
            "array_record format with splits train and test (or validation)"
        ) from error
    features: Any = builder.info.features
    if features is None or not {"image", "label"} <= set(features):
        raise DataError(
            f"the TFDS data set in {path} has features {sorted(features or ())}; "
            "expected image and label, an image classification data set"
        )
    shape = features["image"].shape
    if None in shape and size is None:
        size = 224
    mode = "L" if shape[-1] == 1 else "RGB"
    train, test = (_Records(source, mode, size) for source in sources)
    image, _ = train[0]
    return Raw(
        *_materialise(train, test, limits, on_progress),
        num_classes=int(features["label"].num_classes),
        image_shape=image.shape,
        stem=builder.name,
        augment="crop" if builder.name in ("mnist", "svhn_cropped") else "crop_flip",
    )


def _list_images(
    root: pathlib.Path, split: str, classes: list[str]
) -> list[tuple[pathlib.Path, int]]:
    files = [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((root / split / name).glob("*"))
        if path.suffix.lower() in _SUFFIXES
    ]
    if not files:
        raise DataError(
            f"no images in {root / split}/CLASS/; expected {root}/train/CLASS/*.jpg "
            f"and {root}/test/CLASS/*.jpg (or .png)"
        )
    # A class at a time would make every prefix of the split one-sided.
    order = np.random.default_rng(0).permutation(len(files))
    return [files[i] for i in order]


def folder(
    path: str,
    *,
    size: int | None,
    limits: Limits,
    on_progress: Progress | None,
) -> Raw:
    """An image folder; classes are the folder names under train/, sorted."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise DataError(f"image files need Pillow; {_INSTALL}") from error
    root = pathlib.Path(path).expanduser()
    below = root / "train"
    classes = sorted(p.name for p in below.iterdir()) if below.is_dir() else []
    train, test = (
        _Files(_list_images(root, split, classes), size) for split in ("train", "test")
    )
    image, _ = train[0]
    return Raw(
        *_materialise(train, test, limits, on_progress),
        num_classes=len(classes),
        image_shape=image.shape,
        stem=root.name,
        augment="crop_flip",
    )

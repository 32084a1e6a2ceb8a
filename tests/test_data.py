"""Data: splits that do not overlap, batches that repeat, errors that say the way out."""

import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

from jaxprune.data import Transform, batches, load, prepare, raw_batches
from jaxprune.errors import DataError


@pytest.fixture(scope="module")
def digits():
    return load("digits", validation=0.1)


def test_digits_are_scikit_learns_scans_in_three_disjoint_parts(digits):
    from sklearn.datasets import load_digits

    scans = load_digits()
    assert (digits.num_classes, digits.image_shape) == (10, (8, 8, 1))
    assert [len(s) for s in (digits.train, digits.validation, digits.test)] == [
        1293,
        144,
        360,
    ]
    assert not set(digits.train.rows) & set(digits.validation.rows)
    seen = [
        (split.images[i].tobytes(), int(split.labels[i]))
        for split in (digits.train, digits.validation, digits.test)
        for i in split.rows
    ]
    scaled = np.round(scans.images[..., None] * (255 / 16)).astype(np.uint8)
    whole = [(x.tobytes(), int(y)) for x, y in zip(scaled, scans.target, strict=True)]
    assert sorted(seen) == sorted(whole)


def test_the_test_split_does_not_depend_on_the_seed_but_validation_does():
    a, b = load("digits", seed=0), load("digits", seed=1)
    np.testing.assert_array_equal(a.test.images, b.test.images)
    assert set(a.validation.rows) != set(b.validation.rows)
    again = load("digits", seed=1)
    np.testing.assert_array_equal(again.validation.rows, b.validation.rows)


def test_validation_as_a_number_a_fraction_and_none():
    assert len(load("digits", validation=100).validation) == 100
    assert load("digits", validation=0).validation is None
    with pytest.raises(DataError, match="there are 1437 training examples"):
        load("digits", validation=1437)


def test_a_pass_holds_every_example_once_in_an_order_fixed_by_seed_and_epoch(digits):
    split = digits.train

    def order(**options):
        options = {"shuffle": True, **options}
        rows = [y for _, y in raw_batches(split, 100, **options)]
        return np.concatenate(rows)

    first = order(seed=3, epoch=2)
    assert len(first) == len(split)
    np.testing.assert_array_equal(
        np.bincount(first), np.bincount(split.labels[split.rows])
    )
    np.testing.assert_array_equal(first, order(seed=3, epoch=2))
    assert (first != order(seed=3, epoch=3)).any()
    assert (first != order(seed=4, epoch=2)).any()
    assert len(order(drop_remainder=True)) == 1200


def test_the_shards_of_two_hosts_make_up_each_batch(digits):
    options = {"seed": 1, "epoch": 1, "shuffle": True, "drop_remainder": True}
    whole = list(raw_batches(digits.train, 100, **options))
    halves = [
        list(raw_batches(digits.train, 100, shard=(host, 2), **options))
        for host in (0, 1)
    ]
    for (x, y), (x0, y0), (x1, y1) in zip(whole, *halves, strict=True):
        np.testing.assert_array_equal(x, np.concatenate([x0, x1]))
        np.testing.assert_array_equal(y, np.concatenate([y0, y1]))


def test_preparation_is_the_published_normalisation():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)
    transform = Transform((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
    expected = (x / 255.0 - np.array(transform.mean)) / np.array(transform.std)
    np.testing.assert_allclose(prepare(x, transform=transform), expected, atol=1e-6)
    wrong = transform._replace(std=transform.std[::-1])
    assert np.abs(prepare(x, transform=wrong) - expected).max() > 0.01


def test_augmented_images_are_shifted_or_mirrored_copies():
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (64, 16, 16, 3)).astype(np.uint8)
    plain = Transform((0.0,) * 3, (1.0,) * 3)
    clean = np.asarray(prepare(x, transform=plain))
    padded = np.pad(clean, ((0, 0), (2, 2), (2, 2), (0, 0)))
    key = jax.random.key(0)
    for augment, flips in (("crop", (1,)), ("crop_flip", (1, -1))):
        found = np.asarray(
            prepare(x, transform=plain._replace(augment=augment), key=key)
        )
        places = set()
        for image, source in zip(found, padded, strict=True):
            matches = [
                (top, left, flip)
                for top in range(5)
                for left in range(5)
                for flip in flips
                if np.array_equal(
                    image, source[top : top + 16, left : left + 16][:, ::flip]
                )
            ]
            assert len(matches) == 1
            places |= set(matches)
        assert len(places) > 15
        assert {flip for _, _, flip in places} == set(flips)


def test_batches_repeat_with_their_crops_and_are_plain_without(digits):
    options = {"seed": 1, "epoch": 4, "augment": True, "shuffle": True}
    first, again = (
        np.concatenate([x for x, _ in batches(digits.train, 200, **options)])
        for _ in range(2)
    )
    np.testing.assert_array_equal(first, again)
    x, y = next(batches(digits.train, 50))
    rows = digits.train.rows[:50]
    transform = digits.train.transform
    np.testing.assert_array_equal(
        x, prepare(digits.train.images[rows], transform=transform)
    )
    np.testing.assert_array_equal(y, digits.train.labels[rows])


def test_image_size_resizes_and_keeps_the_brightness(digits):
    large = load("digits", image_size=32)
    assert large.image_shape == (32, 32, 1)
    a, b = large.test.images.mean((1, 2, 3)), digits.test.images.mean((1, 2, 3))
    np.testing.assert_allclose(a, b, rtol=0.1)


def write_npz(path, **arrays):
    path.mkdir(exist_ok=True)
    for split in ("train", "test"):
        np.savez(path / f"{split}.npz", **arrays)


def test_npz_is_read_and_wrong_arrays_are_named(tmp_path):
    x = np.arange(20 * 8 * 8 * 3).reshape(20, 8, 8, 3).astype(np.uint8)
    y = np.arange(20) % 4
    write_npz(tmp_path, x=x, y=y)
    data = load(f"npz:{tmp_path}", validation=0)
    assert data.num_classes == 4
    np.testing.assert_array_equal(data.train.images, x)
    np.testing.assert_allclose(
        data.train.transform.mean, (x / 255).mean((0, 1, 2)), atol=1e-4
    )
    write_npz(tmp_path, x=x.astype(np.float32), y=y)
    with pytest.raises(DataError, match="found x float32"):
        load(f"npz:{tmp_path}")
    write_npz(tmp_path, x=x)
    with pytest.raises(DataError, match="expected an npz file with arrays x and y"):
        load(f"npz:{tmp_path}")


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(("cat", "dog")):
            directory = tmp_path / split / name
            directory.mkdir(parents=True)
            for i in range(count):
                image = rng.integers(0, 100, (20, 30, 3)) + 150 * label
                Image.fromarray(image.astype(np.uint8)).save(directory / f"{i}.png")
    return tmp_path


def test_image_folders_are_cropped_to_the_size_and_labelled_by_name(folder):
    data = load(f"folder:{folder}", image_size=16, validation=2)
    assert (data.num_classes, data.image_shape) == (2, (16, 16, 3))
    assert [len(s) for s in (data.train, data.validation, data.test)] == [10, 2, 6]
    bright = data.test.images.mean((1, 2, 3)) > 120
    np.testing.assert_array_equal(bright, data.test.labels == 1)


def test_images_that_do_not_fit_in_memory_are_streamed_alike(folder, monkeypatch):
    pytest.importorskip("grain")
    options = {"image_size": 16, "validation": 2}
    held = load(f"folder:{folder}", **options)
    monkeypatch.setattr("jaxprune.data.decoding.MEMORY_LIMIT_BYTES", 100)
    streamed = load(f"folder:{folder}", **options)
    assert held.train.in_memory and not streamed.train.in_memory
    # Statistics of a streamed set are ImageNet's: compare before normalisation.
    order = {"shuffle": True, "seed": 1, "epoch": 2}
    pairs = zip(
        raw_batches(held.train, 4, **order),
        raw_batches(streamed.train, 4, **order),
        strict=True,
    )
    for (x, y), (streamed_x, streamed_y) in pairs:
        np.testing.assert_array_equal(x, streamed_x)
        np.testing.assert_array_equal(y, streamed_y)


def test_folders_without_images_and_damaged_images_are_named(folder, tmp_path):
    with pytest.raises(DataError, match="no images in .*nope/train/CLASS"):
        load(f"folder:{tmp_path}/nope")
    (folder / "test" / "cat" / "0.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"cannot decode .*0\.png"):
        load(f"folder:{folder}", image_size=16)


def write_tfds(root, name="toy", count=30):
    """A prepared TFDS data set of `count` training images, without TensorFlow."""
    tfds = pytest.importorskip("tensorflow_datasets")
    epath = pytest.importorskip("etils.epath")
    rng = np.random.default_rng(0)

    class Toy(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = epath.Path(root)

        def _info(self):
            features = tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(
                        shape=(8, 8, 3), encoding_format="png"
                    ),
                    "label": tfds.features.ClassLabel(num_classes=3),
                }
            )
            return self.dataset_info_from_configs(features=features)

        def _split_generators(self, dl_manager):
            del dl_manager
            return {"train": self._rows(count), "test": self._rows(9)}

        def _rows(self, rows):
            for i in range(rows):
                image = rng.integers(0, 256, (8, 8, 3)).astype(np.uint8)
                png = io.BytesIO()
                Image.fromarray(image).save(png, "png")
                yield i, {"image": png.getvalue(), "label": i % 3}

        def _generate_examples(self):
            raise NotImplementedError

    Toy.name = name
    Toy(data_dir=str(root), file_format="array_record").download_and_prepare()


def test_a_prepared_tfds_data_set_is_read_without_tensorflow(tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    write_tfds(tmp_path)
    seen = []
    data = load(
        "toy",
        data_dir=str(tmp_path),
        validation=6,
        on_progress=lambda *step: seen.append(step),
    )
    assert (data.num_classes, data.image_shape) == (3, (8, 8, 3))
    assert [len(s) for s in (data.train, data.validation, data.test)] == [24, 6, 9]
    assert seen == [("decode train", 30, 30), ("decode test", 9, 9)]
    builder = tfds.builder_from_directory(str(tmp_path / "toy" / "1.0.0"))
    for i, record in enumerate(builder.as_data_source("test")):
        np.testing.assert_array_equal(data.test.images[i], record["image"])
        assert data.test.labels[i] == record["label"]
    few = load("toy:1.0.0", data_dir=str(tmp_path), train_examples=10, validation=2)
    assert [len(few.train), len(few.validation)] == [8, 2]


def test_a_data_set_that_is_not_prepared_is_one_line_with_what_is_there(tmp_path):
    (tmp_path / "toy" / "1.0.0").mkdir(parents=True)
    for file in ("dataset_info.json", "features.json"):
        (tmp_path / "toy" / "1.0.0" / file).write_text(json.dumps({}))
    cases = {
        ("toyy", str(tmp_path)): "'toyy' under .*: it holds toy; point data_dir",
        ("toy:2.0.0", str(tmp_path)): "'toy:2.0.0' under .*: it holds toy",
        ("cifar10", str(tmp_path / "no")): "there is no such directory; point data_dir",
    }
    for (name, data_dir), text in cases.items():
        with pytest.raises(DataError, match=text) as caught:
            load(name, data_dir=data_dir)
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="cannot open the TFDS data set"):
        load("toy", data_dir=str(tmp_path))

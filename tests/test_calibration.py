"""Calibration batches and losses: what is wrong is said before anything is measured."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from zoo import make, random_batches

import jaxprune as jp
from jaxprune.errors import DataError, ScoreError
from jaxprune.methods.measure import Calibration, cross_entropy
from jaxprune.methods.relay import measure_moments
from jaxprune.methods.taps import find_taps
from jaxprune.stats.moments import covariances

CLASSES = 4


def mlp(params, x):
    hidden = jax.nn.relu(x @ params["a"] + params["b"])
    return jax.nn.relu(hidden @ params["c"]) @ params["d"]


def normalised(params, x):
    return mlp(params, x / jnp.linalg.norm(x, axis=1, keepdims=True))


def parameters(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"a": (6, 16), "b": (16,), "c": (16, 12), "d": (12, CLASSES)}
    return {
        name: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), dtype)
        for name, shape in shapes.items()
    }


BATCHES = random_batches((6,), CLASSES, count=20, size=16)
X, Y = BATCHES[0]


def prune(batches, model=mlp, method="cpli", **options):
    return jp.prune(model, parameters(), batches, method=method, macs=0.5, **options)


@pytest.mark.parametrize(
    "method",
    ["cpli", "lasso", "taylor_examples", "activation_mean", "importance_redundancy"],
)
def test_a_short_last_batch_counts_as_its_examples(method):
    """Rows of zeros would be NaN in a model that divides by its input's norm."""
    whole = [tuple(np.concatenate(parts) for parts in zip(*BATCHES, strict=True))]
    assert [len(x) for x, _ in BATCHES] == [16, 4]
    plans = [
        prune(batches, normalised, method, positions=None).plan.to_json()
        for batches in (whole, BATCHES)
    ]
    assert plans[0] == plans[1]


class _OneIterator:
    def __init__(self, batches):
        self.only = iter(batches)

    def __iter__(self):
        return self.only


@pytest.mark.parametrize("sizes", [(12, 12, 12, 12), (20, 20, 8)])
def test_sampled_positions_do_not_depend_on_the_split(sizes):
    model, variables, like = make("vgg_small")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(48, *like.shape[1:])).astype(np.float32)
    found = []
    for data in ([x], np.split(x, np.cumsum(sizes)[:-1])):
        graph = jp.trace(model, variables, data[0])
        moments = measure_moments(
            graph, find_taps(graph), variables, variables, Calibration(data),
            positions=5, seed=3,
        )  # fmt: skip
        found.append(moments)
    for name, whole in found[0].items():
        one, other = covariances(whole), covariances(found[1][name])
        np.testing.assert_allclose(other.xx, one.xx, rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(other.mean_y, one.mean_y, rtol=1e-3, atol=1e-5)


def test_one_iterator_is_read_once_and_another_pass_must_be_the_same():
    data = Calibration(_OneIterator(BATCHES))
    for _ in range(2):
        assert sum(int(np.sum(weight)) for *_, weight in data) == 20

    class Fewer:
        left = 3

        def __iter__(self):
            self.left -= 1
            yield from BATCHES[: self.left]

    fewer = Calibration(Fewer())
    assert fewer.count == 2
    with pytest.raises(DataError, match=r"expected 4 examples .* found no batch; pass"):
        list(fewer)


SPOILT = np.where(np.arange(96).reshape(16, 6) == 20, np.nan, X).astype(np.float32)


@pytest.mark.parametrize(
    ("batches", "error"),
    [
        ((X, Y), r"found \(float32\[16, 6\], int32\[16\]\); one batch .* \[\(x, y\)\]"),
        (X, r"found float32\[16, 6\]; one batch alone is passed as"),
        ([X, Y], r"x of calibration batch 1: expected float32\[16, 6\]"),
        (None, r"no calibration batches: .*prune\(model, variables, batches\)"),
        (5, "an iterable of .*, found 5"),
        ("a", "found 'a'"),
        ({"x": X}, r"found \{'x': float32"),
        ([{"x": X, "y": Y}], r"calibration batch 0: expected \(x, y\)"),
        ([(X, Y[:8])], r"found x float32\[16, 6\] and y int32\[8\]"),
        ([(X, np.r_[Y, Y])], r"one row for each example.* y int32\[32\]"),
        ([(X, Y), (X, None)], r"y of calibration batch 1: expected int32.* found None"),
        ([(X, None), (X, Y)], r"y of calibration batch 1: expected None .* int32\[16"),
        ([(X, Y), (X[:, :5], Y)], r"x of calibration batch 1: .* found float32\[16, 5"),
        ([(X.tolist(), Y)], "x of calibration batch 0: expected arrays of numbers"),
        ([(X.astype(object), Y)], r"expected arrays of numbers .* found object\[16, 6"),
        ([("a", Y)], "found 'a'; convert with np.asarray"),
        ([(X, np.array(["a"] * 16))], r"y of calibration batch 0: .*<U1\[16\]"),
        ([(X, {})], "y of calibration batch 0 holds no array"),
        ([(X[:0], Y[:0])], "the first calibration batch has no example"),
        (
            [(X, Y), (SPOILT, Y)],
            r"calibration batch 1 holds NaN, first in example 3 of",
        ),
        (
            [(jnp.asarray(SPOILT), Y)],
            "calibration batch 0 holds NaN, first in example 3",
        ),
    ],
)
def test_batches_of_another_form_are_named(batches, error):
    for method in ("cpli", "l2"):
        with pytest.raises(DataError, match=error):
            prune(batches, method=method)


def test_labels_may_be_a_list_or_a_tree():
    wanted = prune([(X, Y)]).plan.to_json()
    assert prune([(X, Y.tolist())]).plan.to_json() == wanted
    own = lambda outputs, y: cross_entropy(outputs, y["label"])
    for method in ("cpli", "taylor", "taylor_examples"):
        flat = prune([(X, Y)], method=method).plan.to_json()
        tree = prune([(X, {"label": Y})], method=method, loss_fn=own).plan.to_json()
        assert tree == flat


OF_LOSS = ("cpli", "taylor", "taylor_examples")


@pytest.mark.parametrize(
    ("y", "error"),
    [
        (Y.astype(np.float32), r"integer labels of shape \(16,\); found float32\[16\]"),
        (np.eye(CLASSES)[Y], r"found float32\[16, 4\]: take the argmax of one-hot"),
        (Y[:, None], r"found int32\[16, 1\]: .*squeeze a last axis"),
        (Y + 1, r"classes 0\.\.3 .* found labels from 1 to 4: count classes from 0"),
        (-Y, r"found labels from -3 to 0"),
    ],
)
def test_labels_that_are_no_classes_are_named(y, error):
    for method in OF_LOSS:
        with pytest.raises(ScoreError, match=error):
            prune([(X, y)], method=method)
    prune([(X, y)], method="lasso", verify=False)  # reads no labels


@pytest.mark.parametrize(
    ("loss_fn", "error"),
    [
        ("ce", "loss_fn must be a function .* found 'ce'"),
        (lambda o, y: jnp.mean(o), r"shape \(16,\); found float32\[\] on outputs"),
        (lambda o, y: o**2, r"shape \(16,\); found float32\[16, 4\] on outputs"),
        (lambda o, y: o.argmax(1), r"floating-point array .* found int32\[16\]"),
        (lambda o, y: o + jnp.zeros(3), "it raised (Type|Value)Error: .*shapes"),
        (lambda o: o, "it raised TypeError"),
    ],
)
def test_losses_that_are_not_per_example_are_refused_by_all(loss_fn, error):
    for method in OF_LOSS:
        with pytest.raises(ScoreError, match=error):
            prune(BATCHES, method=method, loss_fn=loss_fn)
    graph = jp.trace(mlp, parameters(), X)
    with pytest.raises(ScoreError, match=error):
        jp.score(graph, parameters(), "fisher", batches=BATCHES, loss_fn=loss_fn)


def test_a_model_of_several_outputs_needs_a_loss_of_its_own():
    def two(params, x):
        return mlp(params, x), mlp(params, x)

    for method in OF_LOSS:
        with pytest.raises(ScoreError, match=r"returns \(float32.*: pass loss_fn="):
            prune(BATCHES, two, method)
        prune(BATCHES, two, method, loss_fn=lambda o, y: cross_entropy(o[0], y))


def test_gradients_of_low_precision_are_summed_in_float32():
    """In float16 the sum over examples overflows."""
    batches = random_batches((6,), CLASSES, count=96, size=32)
    graph = jp.trace(mlp, parameters(), batches[0][0])
    exact = jp.score(graph, parameters(), "taylor", batches=batches)
    low = parameters(jnp.float16)
    steep = lambda outputs, y: 30_000 * cross_entropy(outputs, y)
    graph = jp.trace(mlp, low, batches[0][0].astype(np.float16))
    halves = [(x.astype(np.float16), y) for x, y in batches]
    found = jp.score(graph, low, "taylor", batches=halves, loss_fn=steep)
    for name, scores in exact.items():
        np.testing.assert_allclose(
            found[name] / 30_000, scores, atol=0.02 * scores.max()
        )

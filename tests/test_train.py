"""Training: exact resumption, sharding, losses and BatchNorm statistics."""

import json
import os
import pathlib
import subprocess
import sys

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxprune import trees
from jaxprune.data import batches, load
from jaxprune.data.dataset import Dataset
from jaxprune.errors import ConfigError, DataError, PruneError
from jaxprune.train import evaluate, fit, loop, recalibrate_batch_norm
from jaxprune.train.step import distillation


class Small(nn.Module):
    """Conv, BatchNorm, dropout, linear: every kind of state that training has."""

    width: int = 8
    momentum: float = 0.9

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        x = nn.BatchNorm(use_running_average=not train, momentum=self.momentum)(x)
        x = nn.relu(x).reshape(x.shape[0], -1)
        x = nn.Dropout(0.1, deterministic=not train)(x)
        return nn.Dense(10)(x)


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load("synthetic", image_size=8, validation=200)


@pytest.fixture(scope="module")
def start(data):
    return Small().init(jax.random.key(0), jnp.zeros((1, *data.image_shape)))


def same(a, b, **tolerance) -> None:
    a, b = trees.flatten(a), trees.flatten(b)
    assert list(a) == list(b)
    for name in a:
        np.testing.assert_allclose(a[name], b[name], err_msg=name, **tolerance)


class Killed(Exception):
    pass


def kill_after(epoch: int):
    def on_metrics(record):
        if record["epoch"] == epoch:
            raise Killed

    return on_metrics


@pytest.mark.parametrize("options", [{}, {"optimizer": "adamw", "ema": 0.99}])
def test_a_killed_run_ends_like_one_that_was_not(tmp_path, data, start, options):
    options = {"epochs": 3, "learning_rate": 0.05, "weight_decay": 1e-4, **options}
    whole = fit(Small(), start, data, **options)
    with pytest.raises(Killed):
        fit(
            Small(),
            start,
            data,
            checkpoint_dir=str(tmp_path),
            on_metrics=kill_after(2),
            **options,
        )
    epochs = []
    resumed = fit(
        Small(),
        start,
        data,
        checkpoint_dir=str(tmp_path),
        on_metrics=lambda record: epochs.append(record["epoch"]),
        **options,
    )
    assert epochs == [3]
    same(resumed, whole, rtol=0, atol=0)
    # The comparison has teeth: one epoch less, or another seed, is seen.
    other = fit(Small(), start, data, seed=1, **options)
    with pytest.raises(AssertionError):
        same(other, whole, rtol=1e-3, atol=1e-3)


def test_a_run_killed_inside_an_epoch_continues_from_the_epoch_before(
    tmp_path, data, start
):
    def interrupt(stage, done, total):
        if done == total - 3:
            raise KeyboardInterrupt

    options = {"epochs": 2, "learning_rate": 0.05, "checkpoint_dir": str(tmp_path)}
    with pytest.raises(KeyboardInterrupt):
        fit(Small(), start, data, on_progress=interrupt, **options)
    resumed = fit(Small(), start, data, **options)
    whole = fit(Small(), start, data, epochs=2, learning_rate=0.05)
    same(resumed, whole, rtol=0, atol=0)


def test_a_checkpoint_of_other_settings_or_another_model_is_refused(
    tmp_path, data, start
):
    options = {"epochs": 1, "checkpoint_dir": str(tmp_path)}
    fit(Small(), start, data, **options)
    with pytest.raises(ConfigError, match="learning_rate: 0.1 -> 0.2"):
        fit(Small(), start, data, learning_rate=0.2, **options)
    wider = Small(width=9)
    other = wider.init(jax.random.key(0), jnp.zeros((1, *data.image_shape)))
    with pytest.raises(
        ConfigError, match=r"Conv_0/kernel: \[3, 3, 3, 8\] -> \[3, 3, 3, 9\]"
    ):
        fit(wider, other, data, **options)


def test_fit_learns_and_leaves_the_callers_arrays_alone(data, start):
    before = jax.tree.map(np.array, start)
    records = []
    trained = fit(
        Small(),
        start,
        data,
        epochs=4,
        label_smoothing=0.1,
        on_metrics=records.append,
    )
    same(start, before, rtol=0, atol=0)
    assert evaluate(Small(), trained, data.test)["accuracy"] > 0.6
    assert [r["epoch"] for r in records] == [1, 2, 3, 4]
    assert records[-1]["loss"] < records[0]["loss"]
    assert records[-1]["learning_rate"] == pytest.approx(0, abs=1e-6)
    json.dumps(records)


class Scripted:
    """Stands in for the evaluator: accuracies of the start and of each epoch."""

    def __init__(self, accuracies):
        self.accuracies, self.seen = list(accuracies), []

    def __call__(self, variables, split, size):
        self.seen.append(jax.device_get(variables))
        return {"accuracy": self.accuracies[len(self.seen) - 1]}


@pytest.mark.parametrize(
    ("accuracies", "epochs", "best"),
    [
        ([0.1, 0.3, 0.5, 0.5, 0.4, 0.9], 4, 2),  # two epochs without a better one
        ([0.9, 0.3, 0.4], 2, 0),  # what was given is best
        ([0.1, 0.2, 0.1, 0.3, 0.2, 0.4], 5, 5),
    ],
)
def test_early_stopping_returns_the_best_epoch(
    data, start, monkeypatch, accuracies, epochs, best
):
    script = Scripted(accuracies)
    monkeypatch.setattr(loop, "make_evaluator", lambda model, transform: script)
    records = []
    found = fit(
        Small(), start, data, epochs=5, patience=2, learning_rate=0.05,
        on_metrics=records.append,
    )  # fmt: skip
    assert len(records) == epochs
    same(found, script.seen[best], rtol=0, atol=0)


def test_an_early_stopped_run_that_was_killed_ends_like_one_that_was_not(
    tmp_path, data, start, monkeypatch
):
    accuracies = [0.1, 0.5, 0.4, 0.3, 0.9]
    options = {"epochs": 4, "patience": 2, "learning_rate": 0.05}
    script = Scripted(accuracies)
    monkeypatch.setattr(loop, "make_evaluator", lambda model, transform: script)
    whole = fit(Small(), start, data, **options)
    options["checkpoint_dir"] = str(tmp_path)
    monkeypatch.setattr(
        loop, "make_evaluator", lambda model, transform: Scripted(accuracies)
    )
    with pytest.raises(Killed):
        fit(Small(), start, data, on_metrics=kill_after(2), **options)
    # The start is measured again, then epoch 3: no better, the first is kept.
    monkeypatch.setattr(
        loop, "make_evaluator", lambda model, transform: Scripted([0.1, 0.3, 0.9])
    )
    resumed = fit(Small(), start, data, **options)
    same(resumed, whole, rtol=0, atol=0)


def test_early_stopping_needs_validation_examples(start):
    data = load("synthetic", image_size=8, validation=0)
    with pytest.raises(ConfigError, match="patience=1 needs validation examples"):
        fit(Small(), start, data, epochs=1, patience=1)


def test_evaluate_counts_every_example_once(data, start):
    x = np.concatenate([np.asarray(x) for x, _ in batches(data.test, 64)])
    y = data.test.labels[data.test.rows]
    logits = np.asarray(Small().apply(start, x, train=False), np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    # 500 examples: a batch of 64 leaves a remainder, 1000 is larger than the split.
    for batch_size in (64, 500, 1000):
        found = evaluate(Small(), start, data.test, batch_size)
        assert found["accuracy"] == pytest.approx((logits.argmax(-1) == y).mean())
        assert found["loss"] == pytest.approx(-log_p[range(500), y].mean(), rel=1e-5)


def test_distillation_is_the_kl_divergence_and_zero_for_equal_logits():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 7))
    p, q = (
        np.exp(a / 3) / np.exp(a / 3).sum(-1, keepdims=True) for a in (teacher, student)
    )
    expected = 9 * (p * np.log(p / q)).sum(-1)
    found = distillation(jnp.asarray(student), jnp.asarray(teacher), temperature=3.0)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    swapped = distillation(jnp.asarray(teacher), jnp.asarray(student), temperature=3.0)
    assert not np.allclose(swapped, expected, rtol=1e-2)
    same_logits = distillation(
        jnp.asarray(student), jnp.asarray(student), temperature=3.0
    )
    np.testing.assert_allclose(same_logits, 0, atol=1e-6)


def test_a_student_with_full_distillation_follows_its_teacher(data, start):
    teacher = fit(Small(), start, data, epochs=3)
    student = fit(
        Small(), start, data, epochs=3, teacher=(Small(), teacher), distill_weight=1.0
    )
    x = next(batches(data.test, 500))[0]

    def agreement(variables):
        a = Small().apply(variables, x).argmax(-1)
        return float((a == Small().apply(teacher, x).argmax(-1)).mean())

    assert agreement(student) > 0.6 > agreement(start)


def test_recalibrated_statistics_are_those_of_all_batches_together(data, start):
    parts = list(batches(data.train, 700))
    assert len({len(x) for x, _ in parts}) > 1
    x = np.concatenate([np.asarray(x) for x, _ in parts])
    kernel = start["params"]["Conv_0"]["kernel"]
    out = np.asarray(
        nn.Conv(8, (3, 3), use_bias=False).apply({"params": {"kernel": kernel}}, x),
        np.float64,
    )
    for momentum in (0.9, 0.5):
        fixed = recalibrate_batch_norm(Small(momentum=momentum), start, parts)
        stats = fixed["batch_stats"]["BatchNorm_0"]
        np.testing.assert_allclose(
            stats["mean"], out.mean((0, 1, 2)), rtol=1e-3, atol=1e-5
        )
        np.testing.assert_allclose(stats["var"], out.var((0, 1, 2)), rtol=1e-3)
    same(fixed["params"], start["params"], rtol=0)


def test_a_model_without_batch_norm_is_returned_as_it_is(start):
    variables = {"params": start["params"]}
    assert recalibrate_batch_norm(Small(), variables, []) is variables


def test_wrong_options_are_named_with_their_ranges(data, start):
    with pytest.raises(ConfigError, match=r"ema=1.5 must be in \[0, 1\)"):
        fit(Small(), start, data, epochs=1, ema=1.5)
    with pytest.raises(ConfigError, match="'adamax' is unknown; use 'sgd' or 'adamw'"):
        fit(Small(), start, data, epochs=1, optimizer="adamax")
    with pytest.raises(DataError, match="1800 training examples are fewer than one"):
        fit(Small(), start, data, epochs=1, batch_size=5000)


def test_a_loss_that_diverges_is_an_error_with_a_remedy(data, start):
    with pytest.raises(PruneError, match="lower learning_rate or set clip_norm"):
        fit(Small(), start, data, epochs=3, learning_rate=1e30, warmup_epochs=0)


EIGHT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
sys.path.insert(0, {tests!r})
from test_train import Small
from jaxprune import trees
from jaxprune.data import load
from jaxprune.train import evaluate, fit
data = load("synthetic", image_size=8, validation=200)
start = Small().init(jax.random.key(0), jnp.zeros((1, *data.image_shape)))
trained = fit(Small(), start, data, epochs=1, learning_rate=0.01, weight_decay=0.0)
scores = evaluate(Small(), trained, data.test, 64)
leaves = {{n: np.asarray(v).tolist() for n, v in trees.flatten(trained).items()}}
print(json.dumps([jax.device_count(), scores, leaves]))
"""


def test_one_device_and_eight_devices_agree(data, start):
    tests = pathlib.Path(__file__).parent
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(tests.parent),
    }
    result = subprocess.run(
        [sys.executable, "-c", EIGHT.format(tests=str(tests))],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    count, scores, leaves = json.loads(result.stdout.splitlines()[-1])
    assert count == 8
    one = fit(Small(), start, data, epochs=1, learning_rate=0.01, weight_decay=0.0)
    same(
        {n: np.asarray(v) for n, v in leaves.items()},
        trees.flatten(one),
        rtol=1e-3,
        atol=1e-5,
    )
    expected = evaluate(Small(), one, data.test, 64)
    assert scores["accuracy"] == pytest.approx(expected["accuracy"], abs=0.005)

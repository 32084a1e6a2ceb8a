"""fit(): trains a classifier, epoch by epoch, and survives being killed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxprune.data.batching import raw_batches
from jaxprune.data.dataset import Dataset
from jaxprune.errors import ConfigError, DataError, PruneError
from jaxprune.train import sharding, stopping
from jaxprune.train.evaluation import make_evaluator
from jaxprune.train.optimizer import make_optimizer, schedule
from jaxprune.train.resume import EpochCheckpoints
from jaxprune.train.step import Losses, final_variables, initial_state, make_step

Progress = Callable[[str, int, int], None]
# Steps that may wait in the device's queue: enough to keep it busy, few enough that
# batches do not pile up in memory.
_AHEAD = 8


def _check(
    *, epochs: int, batch_size: int, examples: int, patience: int | None, losses: Losses
) -> None:
    ranges = {
        "epochs": (epochs, epochs >= 0, "0 or more"),
        "batch_size": (batch_size, batch_size >= 1, "1 or more"),
        "label_smoothing": (
            losses.label_smoothing,
            0 <= losses.label_smoothing < 1,
            "in [0, 1)",
        ),
        "distill_weight": (
            losses.distill_weight,
            0 <= losses.distill_weight <= 1,
            "in [0, 1]",
        ),
        "temperature": (losses.temperature, losses.temperature > 0, "above 0"),
        "patience": (patience, patience is None or patience >= 1, "1 or more"),
        "ema": (losses.ema, 0 <= losses.ema < 1, "in [0, 1)"),
    }
    wrong = [
        f"{name}={value} must be {allowed}"
        for name, (value, valid, allowed) in ranges.items()
        if not valid
    ]
    if wrong:
        raise ConfigError("; ".join(wrong))
    sharding.check_divisible(batch_size)
    if examples < batch_size:
        raise DataError(
            f"{examples} training examples are fewer than one batch of {batch_size}; "
            "choose a smaller batch_size or more examples"
        )


def fit(
    model: Any,
    variables: Any,
    dataset: Dataset,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 0.1,
    optimizer: str = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    decay_all: bool = True,
    warmup_epochs: float = 1.0,
    clip_norm: float | None = None,
    label_smoothing: float = 0.0,
    ema: float = 0.0,
    teacher: tuple[Any, Any] | None = None,
    distill_weight: float = 0.5,
    temperature: float = 4.0,
    patience: int | None = None,
    seed: int = 0,
    checkpoint_dir: str | None = None,
    stage: str = "train",
    on_progress: Progress | None = None,
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
) -> Any:
    """The variables after training on `dataset.train`; the caller's are unchanged.

    Batches are split over all devices. The order of examples, their crops and the
    dropout are functions of (seed, epoch, batch), so a run that was killed and is
    started again with the same arguments ends with the same variables as one that
    was not.

    Args:
      model: Linen classifier, called with `train=True` where it takes such a flag.
      variables: where to start, {"params": ..., "batch_stats": ...}.
      dataset: trained on `train`, measured after each epoch on `validation`.
      epochs: passes over the training examples; a last partial batch is left out.
      batch_size: over all devices.
      learning_rate: peak of the schedule: linear warm-up, then cosine to zero.
      optimizer: "sgd" (Nesterov) or "adamw".
      momentum: of SGD.
      weight_decay: L2 coefficient of SGD, decoupled decay of AdamW.
      decay_all: decay biases and norm scales as well as kernels.
      warmup_epochs: length of the warm-up.
      clip_norm: largest global norm of a gradient.
      label_smoothing: share of the target spread over all classes.
      ema: decay a step of a moving average of the weights, which is then returned.
      teacher: (model, variables) to distil from.
      distill_weight: share of the distillation in the loss.
      temperature: of the distillation.
      patience: stop after so many epochs without a higher validation accuracy, and
        return the variables that had the highest (the start counts); None trains all
        epochs and returns the last.
      seed: of everything random.
      checkpoint_dir: keeps the state after each epoch; a later call continues there.
      stage: name of this training for the two callbacks.
      on_progress: called with (stage, steps done, steps in all).
      on_metrics: called after each epoch with a JSON-ready record.

    Raises:
      ConfigError: an option is out of range, or differs from the checkpoint's, or
        patience is asked for without validation examples.
      DataError: fewer examples than one batch.
      PruneError: the loss is no longer finite.
    """
    losses = Losses(label_smoothing, distill_weight, temperature, ema)
    examples = len(dataset.train)
    _check(
        epochs=epochs, batch_size=batch_size, examples=examples, patience=patience,
        losses=losses,
    )  # fmt: skip
    if patience is not None and dataset.validation is None:
        raise ConfigError(
            f"patience={patience} needs validation examples: hold some out with "
            "validation= above 0, or leave patience out"
        )
    steps = examples // batch_size
    rate = schedule(
        learning_rate=learning_rate,
        warmup_steps=round(warmup_epochs * steps),
        total_steps=epochs * steps,
    )
    tx = make_optimizer(
        optimizer,
        rate,
        momentum=momentum,
        weight_decay=weight_decay,
        decay_all=decay_all,
        clip_norm=clip_norm,
    )
    checkpoints = EpochCheckpoints(
        checkpoint_dir,
        {
            "epochs": epochs,
            "batch_size": batch_size,
            "learning_rate": learning_rate,
            "optimizer": optimizer,
            "patience": patience,
            "seed": seed,
        },
    )
    transform = dataset.train.transform
    evaluator = make_evaluator(model, transform)

    def validated(state: Any) -> dict[str, Any]:
        if dataset.validation is None:
            return {}
        size = min(500, len(dataset.validation))
        return evaluator(final_variables(state), dataset.validation, size)

    state, best = initial_state(variables, tx, ema=ema), None
    if patience is not None:
        accuracy = validated(sharding.replicate(state))["accuracy"]
        best = stopping.record(None, accuracy, 0, final_variables(state))
    first, (state, best) = checkpoints.restore((state, best))
    state = sharding.replicate(state)
    teacher_model, teacher_variables = teacher or (None, None)
    train_step = functools.partial(
        make_step(
            model, tx, transform=transform, losses=losses, teacher_model=teacher_model
        ),
        teacher=sharding.replicate(teacher_variables),
    )
    for epoch in range(first, epochs):
        if best is not None and stopping.exhausted(best, epoch, patience or 0):
            break

        def advance(done: int, epoch: int = epoch) -> None:
            if on_progress is not None:
                on_progress(stage, epoch * steps + done, epochs * steps)

        state, metrics = _run_epoch(
            train_step,
            state,
            dataset,
            batch_size=batch_size,
            seed=seed,
            epoch=epoch,
            advance=advance,
        )
        record = _epoch_record(
            stage, epoch, metrics, float(np.asarray(rate(int(state.step))))
        )
        scores = validated(state)
        record |= {f"validation_{name}": v for name, v in scores.items()}
        if best is not None:
            best = stopping.record(
                best, scores["accuracy"], epoch + 1, final_variables(state)
            )
        checkpoints.save(epoch + 1, (state, best))
        if on_metrics is not None:
            on_metrics(record)
    found = final_variables(state) if best is None else best.variables
    return jax.device_get(found)


def _run_epoch(
    train_step: Callable[..., Any],
    state: Any,
    dataset: Dataset,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    advance: Callable[[int], None],
) -> tuple[Any, np.ndarray]:
    """(state, metrics float32 (steps, 2)) after one pass over the training split."""
    batches = raw_batches(
        dataset.train,
        batch_size,
        seed=seed,
        epoch=epoch,
        shuffle=True,
        drop_remainder=True,
        shard=sharding.host(),
    )
    metrics: list[jax.Array] = []
    for index, (x, y) in enumerate(batches):
        x, y = sharding.place(x, y)
        state, measured = train_step(state, x, y, seed, epoch, index)
        metrics.append(measured)
        jax.block_until_ready(metrics[max(index - _AHEAD, 0)])
        advance(index + 1)
    return state, np.asarray(metrics)


def _epoch_record(
    stage: str, epoch: int, metrics: np.ndarray, rate: float
) -> dict[str, Any]:
    """The JSON-ready line of one epoch. Raises PruneError for a loss that diverged."""
    loss, accuracy = metrics.mean(0)
    if not np.isfinite(loss):
        raise PruneError(
            f"{stage}: the training loss is {loss} in epoch {epoch + 1}; lower "
            "learning_rate or set clip_norm"
        )
    return {
        "stage": stage,
        "epoch": epoch + 1,
        "loss": float(loss),
        "accuracy": float(accuracy),
        "learning_rate": rate,
    }

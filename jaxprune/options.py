"""The options of a job, checked as a whole before anything runs."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxprune.errors import ConfigError
from jaxprune.schedule import SCHEDULES, removed_shares


@dataclass(frozen=True)
class Training:
    """How `jaxprune.train.fit` is called; the fields are its options.

    `distill_weight` > 0 distils from the unpruned network (fine-tuning only).
    """

    epochs: int = 20
    batch_size: int = 128
    learning_rate: float = 0.1
    optimizer: str = "sgd"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    decay_all: bool = True
    warmup_epochs: float = 1.0
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    ema: float = 0.0
    distill_weight: float = 0.0
    temperature: float = 4.0
    patience: int | None = None


@dataclass(frozen=True)
class Calibration:
    """Which training examples the statistics are taken from."""

    examples: int = 2000
    batch_size: int = 250


@dataclass(frozen=True)
class Pruning:
    """What is asked of `jaxprune.prune`; None leaves an option at its default there.

    Attributes:
      method: "cpli", "lasso", "importance_redundancy", or a criterion's name.
      ignore: patterns of layers that keep all their channels, with commas between.
      macs: share of the MACs that remains.
      params: share of the parameters that remains.
      latency_ms: what `latency_batch` images may take on this device.
      schedule: None or "one-shot" to prune at once, "linear" or "cubic" in `steps`.
      steps: how many.
      step_epochs: epochs of fine-tuning between two steps, 0 for none.
      preset: "" or, for importance_redundancy, "seed".
      entropy_threshold: of importance_redundancy.
      similarity_threshold: of importance_redundancy.
      importance: of importance_redundancy, "entropy" or a criterion's name.
      bins: of importance_redundancy, "shared" or "range".
      pairing: of importance_redundancy, "clusters" or "pairs".
      spatial: of importance_redundancy, correlate over space as well.
      fold: of importance_redundancy, survivors take over their twins' weights.
      round_to: widths are multiples of it (8 for tensor cores and vector units).
      min_keep: channels that every group keeps at least.
      strategy: of criteria, "uniform", "global" or "isomorphic".
      allocation: widths of the methods that go layer by layer, "sensitivity" or
        "uniform".
      selection: of cpli, "elimination" or, as published, "lasso".
      mu: weight of the classification loss in cpli.
      feature_importance: weigh features by what the next layer needs, in cpli.
      refit: "none", "bias" or "lstsq".
      passes: "sequential" or "single".
      compensate: refit to what shortcut sums are short of.
      refit_again: refit once more what was refitted before a layer ahead was pruned.
      positions: samples an image and layer, 0 for all.
      ridge: of the refit; None for the rule.
      layer_epochs: epochs of fine-tuning after each layer at most, 0 for none.
      layer_patience: `patience` of that fine-tuning, see `jaxprune.train.fit`.
      recalibrate: measure BatchNorm statistics afresh on the pruned network.
    """

    method: str = "cpli"
    macs: float | None = 0.5
    params: float | None = None
    latency_ms: float | None = None
    schedule: str | None = None
    steps: int | None = None
    step_epochs: int = 0
    preset: str = ""
    entropy_threshold: float | None = None
    similarity_threshold: float | None = None
    importance: str | None = None
    bins: str | None = None
    pairing: str | None = None
    spatial: bool | None = None
    fold: bool | None = None
    ignore: str | None = None
    round_to: int | None = None
    min_keep: int | None = None
    strategy: str | None = None
    allocation: str | None = None
    selection: str | None = None
    mu: float | None = None
    feature_importance: bool | None = None
    refit: str | None = None
    passes: str | None = None
    compensate: bool | None = None
    refit_again: bool | None = None
    positions: int | None = None
    ridge: float | None = None
    layer_epochs: int = 0
    layer_patience: int | None = None
    recalibrate: bool = False


@dataclass(frozen=True)
class Options:
    """A job: data, model, training, pruning and fine-tuning.

    Attributes:
      data: name for `jaxprune.data.load`.
      data_dir: where TFDS data sets are.
      image_size: resize images to this height and width.
      validation: examples held out of the training split, a fraction below 1.
      train_examples: use only so many.
      test_examples: use only so many.
      model: name for `jaxprune.models.create`.
      width: multiplies all widths of the model.
      dtype: of the computation, "float32" or "bfloat16".
      init_from: base weights, a checkpoint directory or npz; training is left out.
      seed: of everything random.
      latency_batch: images in the batch that latency is of, asked and measured.
    """

    data: str = "digits"
    data_dir: str | None = None
    image_size: int | None = None
    validation: float = 0.1
    train_examples: int | None = None
    test_examples: int | None = None
    model: str = "vgg_small"
    width: float = 1.0
    dtype: str = "float32"
    init_from: str | None = None
    seed: int = 0
    latency_batch: int = 64
    train: Training = field(default_factory=Training)
    calibration: Calibration = field(default_factory=Calibration)
    prune: Pruning = field(default_factory=Pruning)
    finetune: Training = field(default_factory=Training)


def from_mapping(mapping: Mapping[str, Any]) -> Options:
    """The options in a nested mapping, such as a ConfigDict; the rest are defaults.

    Raises:
      ConfigError: unknown names, values of the wrong type or out of range, all listed.
    """
    problems: list[str] = []
    options = _read(Options, mapping, "", problems)
    if not problems:
        problems = range_problems(options)
    if problems:
        raise ConfigError("; ".join(problems))
    return options


def flat(options: Options) -> dict[str, Any]:
    """{"train.epochs": value, ...}: every field by its dotted name."""
    return {
        f"{name}.{inner}" if isinstance(value, dict) else name: leaf
        for name, value in dataclasses.asdict(options).items()
        for inner, leaf in (value.items() if isinstance(value, dict) else [("", value)])
    }


def _read(record: type, mapping: Mapping[str, Any], prefix: str, problems: list) -> Any:
    hints = typing.get_type_hints(record)
    values = {}
    for name in mapping:
        value = mapping[name]
        if name not in hints:
            close = difflib.get_close_matches(name, hints, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else "remove it"
            problems.append(f"unknown field {prefix}{name}, {hint}")
        elif dataclasses.is_dataclass(hints[name]):
            values[name] = _read(hints[name], value, f"{prefix}{name}.", problems)
        else:
            values[name] = _value(prefix + name, value, hints[name], problems)
    return record(**values)


def _value(name: str, value: Any, hint: Any, problems: list[str]) -> Any:
    union = isinstance(hint, types.UnionType)
    allowed = typing.get_args(hint) if union else (hint,)
    if float in allowed and type(value) is int:
        return float(value)
    if type(value) not in allowed:
        expected = " or ".join(
            "None" if a is type(None) else a.__name__ for a in allowed
        )
        problems.append(f"{name}={value!r}: expected {expected}")
    return value


def _at_least(low: float) -> tuple[str, Callable[[float], bool]]:
    return f"{low} or more", lambda value: value >= low


def _one_of(*names: str) -> tuple[str, Callable[[str], bool]]:
    return " or ".join(map(repr, names)), lambda value: value in names


_FRACTION = "above 0 and at most 1", lambda value: 0 < value <= 1
_SHARE = "from 0 to below 1", lambda value: 0 <= value < 1
_POSITIVE = "above 0", lambda value: value > 0
_TRAINING = {
    "epochs": _at_least(0),
    "batch_size": _at_least(1),
    "learning_rate": _POSITIVE,
    "optimizer": ("'sgd' or 'adamw'", lambda value: value in ("sgd", "adamw")),
    "momentum": _SHARE,
    "weight_decay": _at_least(0),
    "warmup_epochs": _at_least(0),
    "clip_norm": _POSITIVE,
    "label_smoothing": _SHARE,
    "ema": _SHARE,
    "distill_weight": ("from 0 to 1", lambda value: 0 <= value <= 1),
    "temperature": _POSITIVE,
    "patience": _at_least(1),
}
_RANGES = {
    "image_size": _at_least(1),
    "validation": _at_least(0),
    "train_examples": _at_least(1),
    "test_examples": _at_least(1),
    "width": _POSITIVE,
    "dtype": (
        "'float32' or 'bfloat16'",
        lambda value: value in ("float32", "bfloat16"),
    ),
    "seed": _at_least(0),
    "latency_batch": _at_least(1),
    "calibration.examples": _at_least(1),
    "calibration.batch_size": _at_least(1),
    "prune.macs": _FRACTION,
    "prune.params": _FRACTION,
    "prune.latency_ms": _POSITIVE,
    "prune.schedule": _one_of(*SCHEDULES),
    "prune.steps": _at_least(1),
    "prune.step_epochs": _at_least(0),
    "prune.preset": ("'' or 'seed'", lambda value: value in ("", "seed")),
    "prune.entropy_threshold": _at_least(0),
    "prune.similarity_threshold": ("from 0 to 1", lambda value: 0 <= value <= 1),
    "prune.round_to": _at_least(1),
    "prune.min_keep": _at_least(1),
    "prune.mu": _at_least(0),
    "prune.positions": _at_least(0),
    "prune.ridge": _at_least(0),
    "prune.refit": _one_of("none", "bias", "lstsq"),
    "prune.passes": _one_of("sequential", "single"),
    "prune.strategy": _one_of("uniform", "global", "isomorphic"),
    "prune.selection": _one_of("lasso", "elimination"),
    "prune.allocation": _one_of("uniform", "sensitivity"),
    "prune.bins": _one_of("shared", "range"),
    "prune.pairing": _one_of("clusters", "pairs"),
    "prune.layer_epochs": _at_least(0),
    "prune.layer_patience": _at_least(1),
    **{f"train.{name}": rule for name, rule in _TRAINING.items()},
    **{f"finetune.{name}": rule for name, rule in _TRAINING.items()},
}


# What importance_redundancy alone takes.
_REDUNDANCY = (
    "preset", "entropy_threshold", "similarity_threshold", "importance", "bins",
    "pairing", "spatial", "fold",
)  # fmt: skip


def range_problems(options: Options) -> list[str]:
    """One line for each value out of its range, and for each contradiction."""
    values = flat(options)
    problems = [
        f"{name}={values[name]!r}: must be {text}"
        for name, (text, valid) in _RANGES.items()
        if values[name] is not None and not valid(values[name])
    ]
    prune = options.prune
    redundancy = prune.method == "importance_redundancy"
    asked = {name: getattr(prune, name) for name in ("macs", "params", "latency_ms")}
    budgets = sum(value is not None for value in asked.values())
    shown = ", ".join(f"prune.{name}={value}" for name, value in asked.items())
    if redundancy and prune.preset and budgets:
        problems.append(
            f"{shown}: the thresholds of the preset decide what remains; set all of "
            "them to None"
        )
    fixed = [
        f"prune.{name}={value!r}"
        for name in ("round_to", "min_keep", "allocation")
        if prune.preset and (value := getattr(prune, name)) is not None
    ]
    if fixed:
        problems.append(
            f"{', '.join(fixed)}: the thresholds of prune.preset={prune.preset!r} "
            "decide what remains; set to None"
        )
    patient = {
        "train.patience": options.train.patience,
        "finetune.patience": options.finetune.patience,
        "prune.layer_patience": prune.layer_patience,
    }
    for name, value in patient.items():
        if value is not None and not options.validation:
            problems.append(
                f"{name}={value} needs validation examples: set validation above 0"
            )
    if budgets > 1 or (not redundancy and budgets == 0):
        problems.append(
            f"{shown}: give exactly one of them for prune.method={prune.method!r}"
        )
    problems += _schedule_problems(prune, budgets)
    if not redundancy:
        given = [
            f"prune.{name}={value!r}"
            for name in _REDUNDANCY
            if (value := getattr(prune, name)) not in ("", None)
        ]
        if given:
            problems.append(
                f"{', '.join(given)}: only for prune.method='importance_redundancy'"
            )
    return problems


def _schedule_problems(prune: Pruning, budgets: int) -> list[str]:
    """What contradicts itself in schedule, steps, step_epochs and layer_epochs."""
    schedule, steps = prune.schedule, prune.steps
    if schedule is None:
        given = [n for n in ("steps", "step_epochs") if getattr(prune, n)]
        return [
            f"prune.{name}={getattr(prune, name)} needs prune.schedule='linear' or "
            "'cubic'"
            for name in given
        ]
    problems = []
    if not budgets:
        problems.append(
            f"prune.schedule={schedule!r} needs a budget to approach: set prune.macs, "
            "prune.params or prune.latency_ms"
        )
    if prune.layer_epochs:
        problems.append(
            f"prune.layer_epochs={prune.layer_epochs} goes layer by layer, without a "
            "schedule: set it to 0 and prune.step_epochs instead, or prune.schedule "
            "to None"
        )
    try:
        shares = removed_shares(schedule, steps)
    except ConfigError as error:
        return [*problems, f"prune.schedule, prune.steps: {error}"]
    if prune.step_epochs and len(shares) < 2:
        problems.append(
            f"prune.step_epochs={prune.step_epochs} is between steps; set prune.steps "
            "to 2 or more"
        )
    return problems

"""run(): train or restore a network, prune it, fine-tune it, measure, report."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

import jaxprune as jp
from jaxprune import checkpoint, cost, models
from jaxprune.criteria import CRITERIA
from jaxprune.data import Dataset, batches, load
from jaxprune.errors import ConfigError, first_line
from jaxprune.options import Options, Training, flat
from jaxprune.records import Slim
from jaxprune.report import append_line, write_json
from jaxprune.summary import write_report
from jaxprune.train import fit, recalibrate_batch_norm
from jaxprune.train.evaluation import make_evaluator
from jaxprune.train.sharding import check_divisible, replicate
from jaxprune.workdir import Workdir

Progress = Callable[[str, int, int], None]
# Fields of `options.Pruning` that `prune` takes by the same name, if they are set.
_METHOD_OPTIONS = (
    "entropy_threshold", "similarity_threshold", "importance", "bins", "pairing",
    "spatial", "fold", "round_to", "min_keep", "strategy", "allocation",
    "selection", "mu",
    "feature_importance", "refit", "passes", "compensate",
    "refit_again", "positions", "ridge",
)  # fmt: skip
STAGES = ("base", "prune", "finetune", "evaluate")


@dataclass(frozen=True, eq=False)
class Setting:
    """What every stage of a job needs."""

    options: Options
    workdir: Workdir
    dataset: Dataset
    model: Any
    start: Any
    say: Callable[[str], None]
    on_progress: Progress

    @property
    def example(self) -> jax.Array:
        """One batch for tracing and for the latency, zeros (B, H, W, C)."""
        count = self.options.latency_batch
        return jnp.zeros((count, *self.dataset.image_shape), jnp.float32)


def known_methods() -> tuple[str, ...]:
    """What `prune.method` may be."""
    return ("cpli", "lasso", "importance_redundancy", *CRITERIA)


def create_model(options: Options, *, num_classes: int) -> Any:
    """The unpruned architecture that the options name."""
    overrides: dict[str, Any] = {}
    if options.width != 1.0:
        overrides["width"] = options.width
    if options.dtype != "float32":
        overrides["dtype"] = jnp.dtype(options.dtype)
    return models.create(options.model, num_classes=num_classes, **overrides)


def _prepare(
    options: Options,
    workdir: Workdir,
    say: Callable[[str], None],
    on_progress: Progress,
) -> Setting:
    """Opens everything that can fail before the first step of training."""
    known = known_methods()
    if options.prune.method not in known:
        raise ConfigError(
            f"prune.method={options.prune.method!r} is unknown; choose one of "
            f"{', '.join(known)}"
        )
    importance = options.prune.importance
    if importance is not None and importance not in CRITERIA:
        raise ConfigError(
            f"prune.importance={importance!r} is unknown; choose one of "
            f"{', '.join(CRITERIA)}"
        )
    create_model(options, num_classes=10)
    for training in (options.train, options.finetune):
        check_divisible(training.batch_size)
    dataset = load(
        options.data,
        data_dir=options.data_dir,
        validation=options.validation,
        image_size=options.image_size,
        train_examples=options.train_examples,
        test_examples=options.test_examples,
        seed=options.seed,
        on_progress=on_progress,
    )
    model = create_model(options, num_classes=dataset.num_classes)
    x = jnp.zeros((1, *dataset.image_shape), jnp.float32)
    try:
        made, shapes = jax.make_jaxpr(
            functools.partial(model.init, train=False), return_shape=True
        )(jax.random.key(0), x)
        arrays = [var.aval for eqn in made.jaxpr.eqns for var in eqn.outvars]
        if any(0 in getattr(array, "shape", ()) for array in arrays):
            raise ValueError("a pooling leaves nothing of so small an image")
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise ConfigError(
            f"model={options.model!r} does not take images of {dataset.image_shape}: "
            f"{first_line(error)}; set image_size, or choose another model"
        ) from error
    if options.init_from is not None:
        start = checkpoint.init_from(options.init_from, shapes)
    else:
        start = jax.jit(functools.partial(model.init, train=False))(
            jax.random.key(options.seed), x
        )
    return Setting(options, workdir, dataset, model, start, say, on_progress)


def _fit(
    setting: Setting,
    model: Any,
    variables: Any,
    training: Training,
    *,
    stage: str,
    resumable: bool,
    teacher: Any = None,
) -> Any:
    options = dataclasses.asdict(training)
    if not training.distill_weight:
        teacher = None
    path = setting.workdir.path

    def note(record: dict[str, Any]) -> None:
        append_line(path / "metrics.jsonl", record)
        setting.say(_epoch_line(record, training.epochs))

    return fit(
        model,
        variables,
        setting.dataset,
        **options,
        teacher=teacher,
        seed=setting.options.seed,
        checkpoint_dir=str(path / f"{stage}_epochs") if resumable else None,
        stage=stage,
        on_progress=setting.on_progress,
        on_metrics=note,
    )


def _epoch_line(record: Mapping[str, Any], epochs: int) -> str:
    """An epoch's record as a line: loss and accuracies."""
    text = (
        f"{record['stage']} epoch {record['epoch']} of {epochs}: "
        f"loss {record['loss']:.4f}, accuracy {record['accuracy']:.2%}"
    )
    held = record.get("validation_accuracy")
    return text if held is None else f"{text}, validation {held:.2%}"


def _base(setting: Setting) -> dict[str, Any]:
    variables = setting.start
    if setting.options.init_from is None:
        variables = _fit(
            setting,
            setting.model,
            variables,
            setting.options.train,
            stage="train",
            resumable=True,
        )
    checkpoint.save_variables(setting.workdir.path / "base", variables)
    shutil.rmtree(setting.workdir.path / "train_epochs", ignore_errors=True)
    return {}


def _base_variables(setting: Setting) -> Any:
    return checkpoint.init_from(setting.workdir.path / "base", setting.start)


def _layer_finetune(setting: Setting) -> Callable[[Any, Any], Any] | None:
    """The training between two layers of a method that works layer by layer."""
    epochs = setting.options.prune.layer_epochs
    if not epochs:
        return None
    training = dataclasses.replace(
        setting.options.finetune,
        epochs=epochs,
        warmup_epochs=min(setting.options.finetune.warmup_epochs, epochs / 10),
        patience=setting.options.prune.layer_patience,
        distill_weight=0.0,
    )

    def finetune(model: Any, variables: Any) -> Any:
        return _fit(
            setting,
            model,
            variables,
            training,
            stage="fine-tune a layer",
            resumable=False,
        )

    return finetune


def _step_finetune(setting: Setting) -> Callable[[Any, Any], Any] | None:
    """The training between two steps of a schedule; each resumes by itself."""
    epochs = setting.options.prune.step_epochs
    if not epochs:
        return None
    training = dataclasses.replace(
        setting.options.finetune, epochs=epochs, distill_weight=0.0
    )
    numbers = itertools.count(1)

    def finetune(model: Any, variables: Any) -> Any:
        stage = f"fine-tune step {next(numbers)}"
        return _fit(setting, model, variables, training, stage=stage, resumable=True)

    return finetune


def _prune(setting: Setting) -> dict[str, Any]:
    options = setting.options.prune
    calibration = setting.options.calibration
    examples = setting.dataset.train.take(
        calibration.examples, seed=setting.options.seed
    )
    measured = list(batches(examples, calibration.batch_size))
    given = {
        name: value
        for name in _METHOD_OPTIONS
        if (value := getattr(options, name)) is not None
    }
    if given.get("positions") == 0:
        given["positions"] = None  # all of them
    if options.ignore is not None:
        given["ignore"] = tuple(options.ignore.split(","))
    between = _layer_finetune if options.schedule is None else _step_finetune
    slim = jp.prune(
        setting.model,
        _base_variables(setting),
        measured,
        method=options.method,
        macs=options.macs,
        params=options.params,
        seed=setting.options.seed,
        latency_ms=options.latency_ms,
        latency_batch=setting.options.latency_batch,
        schedule=options.schedule,
        steps=options.steps,
        finetune=between(setting),
        preset=options.preset or None,
        on_progress=setting.on_progress,
        **given,
    )
    if options.recalibrate:
        variables = recalibrate_batch_norm(slim.model, slim.variables, measured)
        slim = dataclasses.replace(slim, variables=variables)
    checkpoint.save(setting.workdir.path / "pruned", slim)
    write_json(setting.workdir.path / "plan.json", slim.plan.to_json())
    for done in setting.workdir.path.glob("fine-tune step *_epochs"):
        shutil.rmtree(done, ignore_errors=True)
    return {}


def _finetune(setting: Setting) -> dict[str, Any]:
    slim = checkpoint.load(setting.workdir.path / "pruned", setting.model)
    variables = slim.variables
    if setting.options.finetune.epochs:
        variables = _fit(
            setting,
            slim.model,
            variables,
            setting.options.finetune,
            stage="fine-tune",
            resumable=True,
            teacher=(setting.model, _base_variables(setting)),
        )
    tuned = Slim(slim.model, variables, slim.plan, slim.report)
    checkpoint.save(setting.workdir.path / "slim", tuned)
    shutil.rmtree(setting.workdir.path / "fine-tune_epochs", ignore_errors=True)
    return {}


def _measure(setting: Setting, model: Any, *trained: Any) -> list[dict[str, Any]]:
    """For each of the variables: test accuracy and loss, and what the network costs.

    All have the same shapes: the model is compiled, traced and timed once.
    """
    test = setting.dataset.test
    evaluator = make_evaluator(model, test.transform)
    size = min(500, len(test))
    graph = jp.trace(model, trained[0], setting.example[:1])
    costs = {
        "macs": int(graph.macs()),
        "params": int(graph.params()),
        "bytes": cost.tree_bytes(trained[0]),
        "latency_ms": float(cost.latency_ms(model, trained[0], setting.example)),
    }
    return [
        {**evaluator(replicate(v), test, size, setting.on_progress), **costs}
        for v in trained
    ]


def _evaluate(setting: Setting) -> dict[str, Any]:
    path = setting.workdir.path
    pruned = checkpoint.load(path / "pruned", setting.model)
    slim = checkpoint.load(path / "slim", setting.model)
    (base,) = _measure(setting, setting.model, _base_variables(setting))
    before, after = _measure(setting, slim.model, pruned.variables, slim.variables)
    return {
        "base": base,
        "pruned": before,
        "finetuned": after,
        **{
            name: slim.report[name]
            for name in (
                "asked",
                "achieved",
                "verify_max_abs_error",
                "groups",
                "seed_ratio",
                "latency",
                "steps",
            )
            if name in slim.report
        },
    }


def run(
    options: Options,
    *,
    workdir: str,
    say: Callable[[str], None] = print,
    on_progress: Progress = lambda stage, done, total: None,
) -> dict[str, Any]:
    """The record of report.json, after all stages that were not finished before.

    The workdir then holds base/, pruned/ and slim/ (checkpoints), plan.json,
    report.json, report.html and metrics.jsonl. The test split is read by the last
    stage only.

    Args:
      options: the job.
      workdir: directory of all files; created where it does not exist.
      say: told what happens, a line at a time.
      on_progress: called with (stage, done, total).

    Raises:
      PruneError: an option, the data, the workdir or `init_from` is not usable, all
        before training starts; or a stage fails, and those before it are kept.
    """
    directory = Workdir(workdir, flat(options))
    setting = _prepare(options, directory, say, on_progress)
    directory.begin()
    if directory.finished:
        done = ", ".join(stage for stage in STAGES if stage in directory.finished)
        say(f"resuming in {directory.path}: finished before: {done}")
    stages = {
        "base": _base,
        "prune": _prune,
        "finetune": _finetune,
        "evaluate": _evaluate,
    }
    for stage in STAGES:
        if stage in directory.finished:
            continue
        say(f"stage {stage}")
        begin = time.perf_counter()
        results = stages[stage](setting)
        seconds = round(time.perf_counter() - begin, 2)
        directory.finish(stage, {"seconds": seconds, "results": results})
    return write_report(options, directory)

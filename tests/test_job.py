"""The job: stages in order, each resumed, the report complete, nothing half checked.

Pruning itself is replaced by taking channel 3 out of the first convolution: what is
tested here is everything around it.
"""

import json
import shutil
import types

import jax
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import checkpoint, cost, job, trees
from jaxprune.data import load
from jaxprune.errors import ConfigError, DataError, PruneError
from jaxprune.options import Options, flat, from_mapping
from jaxprune.records import Plan, Slim
from jaxprune.train import evaluate

KEEP = np.delete(np.arange(8), 3)


def first_channel_out(model, variables, batches, *, finetune=None, **asked):
    assert all(x.dtype == np.float32 for x, _ in batches)
    leaves = trees.flatten(variables)
    for name in leaves:
        if name.startswith(("params/conv0/", "params/bn0/", "batch_stats/bn0/")):
            leaves[name] = leaves[name][..., KEEP]
    leaves["params/conv1/kernel"] = leaves["params/conv1/kernel"][:, :, KEEP]
    sliced = trees.unflatten_like(variables, leaves)
    slim = model.resized(sliced)
    if finetune is not None:
        sliced = finetune(slim, sliced)
    asked.pop("on_progress")("prune", 1, 1)
    report = {
        "asked": {k: v for k, v in asked.items() if v is not None},
        "achieved": {"macs": 0.9},
        "groups": [{"name": "conv0", "size": 8, "kept": 7}],
        "verify_max_abs_error": 1e-6,
    }
    if asked["preset"] == "seed":
        report["seed_ratio"] = 1.25
    return Slim(slim, sliced, Plan({"conv0": KEEP}, {"conv0": 8}), report)


def trace(model, variables, x):
    del model
    assert x.shape[1:] == (8, 8, 1)
    count = sum(a.size for a in jax.tree.leaves(variables["params"]))
    return types.SimpleNamespace(macs=lambda: 64 * count, params=lambda: count)


@pytest.fixture(scope="module", autouse=True)
def fakes():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jp, "prune", first_channel_out, raising=False)
        patch.setattr(jp, "trace", trace, raising=False)
        patch.setattr(cost, "latency_ms", lambda model, variables, x: 2.0)
        yield


def small(**changes) -> Options:
    training = {"epochs": 2, "batch_size": 64, "learning_rate": 0.05}
    return from_mapping(
        {
            "width": 0.25,
            "train_examples": 500,
            "train": training,
            "finetune": {**training, "epochs": 1, "distill_weight": 0.5},
            "calibration": {"examples": 100, "batch_size": 64},
            **changes,
        }
    )


def quiet(*_):
    pass


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The workdir of a job that ran to its end."""
    path = tmp_path_factory.mktemp("job") / "w"
    job.run(small(), workdir=str(path), say=quiet)
    return path


def test_a_job_leaves_checkpoints_plan_report_and_metrics(finished):
    path = finished
    report = json.loads((path / "report.json").read_text())
    assert report["method"] == "cpli" and report["seed"] == 0
    assert report["config"] == flat(small())
    assert report["groups"] == [{"name": "conv0", "size": 8, "kept": 7}]
    assert report["asked"]["macs"] == 0.5
    assert list(report["seconds"]) == list(job.STAGES)
    for stage in ("base", "pruned", "finetuned"):
        assert set(report[stage]) >= {
            "accuracy",
            "macs",
            "params",
            "bytes",
            "latency_ms",
        }
    assert report["finetuned"]["params"] == report["pruned"]["params"]
    assert report["pruned"]["params"] < report["base"]["params"]
    plan = json.loads((path / "plan.json").read_text())
    assert plan == {"conv0": {"size": 8, "kept": KEEP.tolist()}}
    lines = [json.loads(s) for s in (path / "metrics.jsonl").read_text().splitlines()]
    assert [(m["stage"], m["epoch"]) for m in lines] == [
        ("train", 1),
        ("train", 2),
        ("fine-tune", 1),
    ]
    html = (path / "report.html").read_text()
    assert "vgg_small on digits, cpli" in html
    assert html.count("<svg") == 2

    # The accuracies in the report are those of what was saved, on the test split.
    slim = checkpoint.load(path / "slim", job.create_model(small(), num_classes=10))
    test = load("digits").test
    accuracy = evaluate(slim.model, slim.variables, test)["accuracy"]
    assert accuracy == pytest.approx(report["finetuned"]["accuracy"])
    assert slim.model.conv_widths[0] == 7


@pytest.mark.parametrize("stage", job.STAGES[1:])
def test_a_second_run_resumes_after_the_last_finished_stage(
    finished, tmp_path, monkeypatch, stage
):
    path = tmp_path / "w"
    shutil.copytree(finished, path)
    done = job.STAGES[: job.STAGES.index(stage)]
    stages = json.loads((path / "stages.json").read_text())
    kept = {name: stages[name] for name in done}
    (path / "stages.json").write_text(json.dumps(kept))
    for name in {"prune": ("pruned", "slim"), "finetune": ("slim",)}.get(stage, ()):
        shutil.rmtree(path / name)

    said = []
    report = job.run(small(), workdir=str(path), say=said.append)
    assert said[0].endswith(f"finished before: {', '.join(done)}")
    begun = [line for line in said[1:] if line.startswith("stage ")]
    assert begun == [f"stage {name}" for name in job.STAGES if name not in done]
    whole = json.loads((finished / "report.json").read_text())
    for result in (report, whole):
        del result["seconds"]
    assert report == whole


def test_a_stage_that_is_interrupted_is_not_marked_finished(
    finished, tmp_path, monkeypatch
):
    def killed(*_, **__):
        raise KeyboardInterrupt

    options = small(init_from=str(finished / "base"))
    with monkeypatch.context() as patch:
        patch.setattr(job, "fit", killed)
        with pytest.raises(KeyboardInterrupt):
            job.run(options, workdir=str(tmp_path), say=quiet)
    assert list(json.loads((tmp_path / "stages.json").read_text())) == ["base", "prune"]


def test_a_finished_job_only_shows_its_report_again(finished, monkeypatch):
    def never(*_, **__):
        raise AssertionError("trained again")

    monkeypatch.setattr(job, "fit", never)
    report = json.loads((finished / "report.json").read_text())
    assert job.run(small(), workdir=str(finished), say=quiet) == report
    with pytest.raises(ConfigError, match="seed: 0 there, 5 now"):
        job.run(small(seed=5), workdir=str(finished), say=quiet)


def test_weights_that_are_given_are_not_trained(finished, tmp_path):
    options = small(init_from=str(finished / "base"))
    said = []
    report = job.run(options, workdir=str(tmp_path), say=said.append)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    epoch = json.loads(line)
    assert epoch["stage"] == "fine-tune"
    assert said[:3] == ["stage base", "stage prune", "stage finetune"]
    assert said[3] == (
        f"fine-tune epoch 1 of 1: loss {epoch['loss']:.4f}, accuracy "
        f"{epoch['accuracy']:.2%}, validation {epoch['validation_accuracy']:.2%}"
    )
    first = json.loads((finished / "report.json").read_text())
    assert report["base"]["accuracy"] == first["base"]["accuracy"]


def test_importance_redundancy_writes_the_statistics_file_of_the_script(
    finished, tmp_path
):
    options = small(
        init_from=str(finished / "base"),
        prune={
            "method": "importance_redundancy",
            "macs": None,
            "entropy_threshold": 0.3,
            "similarity_threshold": 0.8,
            "preset": "seed",
            "layer_epochs": 1,
        },
    )
    report = job.run(options, workdir=str(tmp_path), say=quiet)
    ratio = report["seed_ratio"]
    assert ratio == 1.25  # by its formula, not that of the whole network
    assert ratio != report["base"]["macs"] / report["finetuned"]["macs"]
    assert (tmp_path / "data_stats0.80.3").read_text() == (
        f"Model Accuracy AFTER REGRESSION  is {report['finetuned']['accuracy']} "
        f"prun_ratio_ach {ratio} SIMILARITY 0.8 ENTROPY 0.3"
    )
    metrics = (tmp_path / "metrics.jsonl").read_text()
    assert '"stage": "fine-tune a layer"' in metrics


def test_steps_are_fine_tuned_and_asked_of_the_pruning(finished, tmp_path, monkeypatch):
    asked = {}

    def prune(*arguments, **given):
        asked.update(given)
        return first_channel_out(*arguments, **given)

    monkeypatch.setattr(jp, "prune", prune)
    steps = {"schedule": "cubic", "steps": 2, "step_epochs": 1}
    options = small(
        init_from=str(finished / "base"),
        prune={"macs": None, "latency_ms": 4.0, **steps},
        latency_batch=32,
    )
    job.run(options, workdir=str(tmp_path), say=quiet)
    assert (asked["latency_ms"], asked["latency_batch"]) == (4.0, 32)
    assert (asked["schedule"], asked["steps"], asked["macs"]) == ("cubic", 2, None)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    stages = [json.loads(line)["stage"] for line in lines]
    assert stages == ["fine-tune step 1", "fine-tune"]
    assert not list(tmp_path.glob("*_epochs"))


def test_a_step_that_was_trained_is_not_trained_again(finished, tmp_path, monkeypatch):
    """The pruning is made again after it was killed, the epochs are not."""
    options = small(
        init_from=str(finished / "base"),
        prune={"schedule": "linear", "steps": 2, "step_epochs": 2},
    )

    def killed(*arguments, **given):
        first_channel_out(*arguments, **given)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(jp, "prune", killed)
        with pytest.raises(KeyboardInterrupt):
            job.run(options, workdir=str(tmp_path), say=quiet)
    job.run(options, workdir=str(tmp_path), say=quiet)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    stages = [json.loads(line)["stage"] for line in lines]
    assert stages == ["fine-tune step 1"] * 2 + ["fine-tune"]


@pytest.mark.parametrize(
    ("changes", "kind", "error"),
    [
        ({"data": "cifr"}, DataError, "no prepared TFDS data set 'cifr'"),
        ({"model": "vgg17"}, ConfigError, "unknown model 'vgg17'"),
        ({"model": "cifar_vgg16_bn"}, ConfigError, "does not take images of"),
        ({"prune": {"method": "cpl"}}, ConfigError, "prune.method='cpl' is unknown"),
        (
            {
                "prune": {
                    "method": "importance_redundancy",
                    "macs": 0.5,
                    "importance": "entropie",
                }
            },
            ConfigError,
            "prune.importance='entropie' is unknown",
        ),
        ({"init_from": "/no/such"}, PruneError, "there is no checkpoint at /no/such"),
    ],
)
def test_what_is_wrong_is_found_before_training(
    tmp_path, monkeypatch, changes, kind, error
):
    def never(*_, **__):
        raise AssertionError("training started")

    monkeypatch.setattr(job, "fit", never)
    with pytest.raises(kind, match=error):
        job.run(small(**changes), workdir=str(tmp_path), say=quiet)
    # The directory is not tied to options that never worked.
    assert not (tmp_path / "config.json").exists()

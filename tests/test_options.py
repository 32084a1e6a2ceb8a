"""Options, arguments, configs and workdirs: every mistake is named with its remedy."""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import models
from jaxprune.arguments import parse_arguments
from jaxprune.errors import BudgetError, CheckpointError, ConfigError
from jaxprune.options import Options, flat, from_mapping
from jaxprune.report import append_line, read_lines
from jaxprune.workdir import Workdir

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


def test_arguments_take_the_type_of_their_defaults():
    found = parse_arguments("method=lasso, macs=0.3,runlocal", **DEFAULTS)
    assert vars(found) == {"method": "lasso", "macs": 0.3, "n": 2, "runlocal": True}
    assert vars(parse_arguments(None, **DEFAULTS)) == DEFAULTS
    assert parse_arguments("runlocal=false", **DEFAULTS).runlocal is False


DEFAULTS = {"method": "cpli", "macs": 0.5, "n": 2, "runlocal": False}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("metod=cpli", "unknown argument 'metod', did you mean 'method'.*: macs, m"),
        ("macs=half", "argument macs=half: expected float, such as 0.5"),
        ("n=1.5", "argument n=1.5: expected int"),
        ("macs", "argument macs needs a value, such as macs=0.5"),
        ("runlocal=maybe", "expected true or false"),
    ],
)
def test_wrong_arguments_are_named(text, error):
    with pytest.raises(ConfigError, match=error):
        parse_arguments(text, **DEFAULTS)


def test_options_come_back_from_their_mapping():
    options = Options(
        data="cifar10", prune=dataclasses.replace(Options().prune, macs=0.3)
    )
    assert from_mapping(dataclasses.asdict(options)) == options
    assert flat(options)["prune.macs"] == 0.3
    assert from_mapping({"validation": 500}).validation == 500.0


@pytest.mark.parametrize(
    ("mapping", "error"),
    [
        ({"prune": {"mac": 0.5}}, "unknown field prune.mac, did you mean prune.macs"),
        ({"colour": 1}, "unknown field colour"),
        ({"seed": "x"}, "seed='x': expected int"),
        ({"train": {"epochs": 2.0}}, "train.epochs=2.0: expected int"),
        ({"prune": {"macs": 0.0}}, "prune.macs=0.0: must be above 0 and at most 1"),
        ({"prune": {"macs": 1.5}}, "prune.macs=1.5: must be above 0 and at most 1"),
        ({"prune": {"macs": None}}, "give exactly one of them"),
        ({"prune": {"params": 0.5}}, "give exactly one of them"),
        ({"prune": {"latency_ms": 5.0}}, "latency_ms=5.0: give exactly one of them"),
        (
            {"prune": {"macs": None, "latency_ms": 0.0}},
            "prune.latency_ms=0.0: must be above 0",
        ),
        ({"prune": {"schedule": "cosine"}}, "'one-shot' or 'linear' or 'cubic'"),
        ({"prune": {"schedule": "linear"}}, "needs a number of steps"),
        ({"prune": {"schedule": "one-shot", "steps": 3}}, "is one step; found steps=3"),
        ({"prune": {"steps": 3}}, "prune.steps=3 needs prune.schedule="),
        ({"prune": {"step_epochs": 1}}, "prune.step_epochs=1 needs prune.schedule="),
        (
            {"prune": {"schedule": "linear", "steps": 1, "step_epochs": 1}},
            "is between steps; set prune.steps to 2 or more",
        ),
        (
            {"prune": {"schedule": "cubic", "steps": 3, "layer_epochs": 1}},
            "goes layer by layer, without a schedule",
        ),
        (
            {
                "prune": {
                    "method": "importance_redundancy",
                    "macs": None,
                    "schedule": "linear",
                    "steps": 2,
                }
            },
            "needs a budget to approach: set prune.macs",
        ),
        (
            {"prune": {"preset": "seed"}},
            "only for prune.method='importance_redundancy'",
        ),
        (
            {"prune": {"method": "importance_redundancy", "preset": "seed"}},
            "thresholds of the preset decide what remains",
        ),
        (
            {
                "prune": {
                    "method": "importance_redundancy",
                    "preset": "seed",
                    "macs": None,
                    "round_to": 8,
                }
            },
            "prune.round_to=8: the thresholds of prune.preset='seed' decide",
        ),
        ({"finetune": {"optimizer": "lion"}}, "finetune.optimizer='lion': must be"),
        ({"prune": {"fold": False}}, "prune.fold=False: only for prune.method='impo"),
        (
            {"validation": 0.0, "finetune": {"patience": 2}},
            "finetune.patience=2 needs validation examples",
        ),
        ({"dtype": "float16"}, "dtype='float16': must be 'float32' or 'bfloat16'"),
    ],
)
def test_wrong_options_are_named(mapping, error):
    with pytest.raises(ConfigError, match=error):
        from_mapping(mapping)


def test_several_wrong_options_are_named_at_once():
    with pytest.raises(ConfigError) as caught:
        from_mapping({"seed": -1, "width": 0.0, "train": {"batch_size": 0}})
    for name in ("seed=-1", "width=0.0", "train.batch_size=0"):
        assert name in str(caught.value)


def get_config(name: str, arg: str | None = None):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(arg)


@pytest.mark.parametrize("name", sorted(p.stem for p in CONFIGS.glob("*.py")))
@pytest.mark.parametrize(
    "arg",
    [
        None,
        "runlocal",
        "macs=0.3",
        "method=importance_redundancy,preset=seed",
        "method=importance_redundancy,macs=0.4",
    ],
)
def test_every_config_names_every_option_and_is_valid(name, arg):
    config = get_config(name, arg)
    options = from_mapping(config)
    named = {
        f"{k}.{inner}" if hasattr(config[k], "keys") else k
        for k in config
        for inner in (config[k] if hasattr(config[k], "keys") else [k])
    }
    assert named == set(flat(options))
    assert options.model in models.names()
    if arg == "macs=0.3":
        assert options.prune.macs == 0.3
    if arg and arg.startswith("method"):
        assert options.prune.method == "importance_redundancy"
        assert (options.prune.preset == "seed") == ("preset" in arg)
        assert options.prune.macs == (0.4 if "macs" in arg else None)
        assert options.prune.layer_patience == (None if "preset" in arg else 1)
        assert options.calibration.examples >= 10_000 or name == "digits"


def test_a_workdir_remembers_stages_and_refuses_another_configuration(tmp_path):
    first = Workdir(str(tmp_path / "w"), {"seed": 0, "macs": 0.5, "data_dir": "a"})
    first.begin()
    first.finish("base", {"seconds": 1.0})
    same = Workdir(str(tmp_path / "w"), {"seed": 0, "macs": 0.5, "data_dir": "b"})
    assert same.finished == {"base": {"seconds": 1.0}}
    with pytest.raises(ConfigError, match=r"\(macs: 0.5 there, 0.3 now\)"):
        Workdir(str(tmp_path / "w"), {"seed": 0, "macs": 0.3, "data_dir": "a"})
    (tmp_path / "w" / "stages.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot read .*stages.json"):
        Workdir(str(tmp_path / "w"), {"seed": 0, "macs": 0.5, "data_dir": "a"})


def test_a_workdir_that_never_began_takes_other_options(tmp_path):
    Workdir(str(tmp_path), {"seed": 0})
    assert Workdir(str(tmp_path), {"seed": 1}).finished == {}


def test_a_workdir_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write to the workdir .*--workdir"):
        Workdir(str(tmp_path / "file"), {})


def test_metrics_keep_the_last_record_of_an_epoch_that_ran_twice(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert read_lines(path) == []
    for epoch, loss in ((1, 3.0), (2, 2.0), (2, 1.0)):
        append_line(path, {"stage": "train", "epoch": epoch, "loss": loss})
    with path.open("a") as file:
        file.write('{"stage": "tr')
    assert [(r["epoch"], r["loss"]) for r in read_lines(path)] == [(1, 3.0), (2, 1.0)]


def _hidden(params, x):
    return jax.nn.relu(x @ params["a"]) @ params["b"]


PARAMS = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}
BATCHES = [(np.ones((4, 3), np.float32), np.zeros(4, int))]
THRESHOLDS = {"method": "importance_redundancy", "macs": None}


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"method": None}, "unknown method None; known: cpli"),
        ({"strategy": "global"}, "'cpli' has no option 'strategy'; .*it takes alloca"),
        ({"normalize": "mean"}, "'cpli' has no option 'normalize'"),
        ({"method": "l2", "allocation": "uniform"}, "'l2' has no option 'allocation'"),
        ({"method": "l2", "normalize": "x"}, "normalize must be 'none', .*found 'x'"),
        ({"allocation": "x"}, "allocation must be 'sensitivity' or 'uniform'"),
        ({"mu": "1"}, "mu must be a finite number, 0 or more; found '1'"),
        ({"mu": float("nan")}, "mu must be"),
        ({"mu": -1.0}, "mu must be"),
        ({"feature_importance": 1}, "feature_importance must be True or False"),
        ({"ridge": float("inf")}, "ridge must be a finite number, 0 or more, or None"),
        ({"ridge": -1.0}, "ridge must be"),
        ({"positions": 0}, "positions must be an integer, 1 or more, or None; found 0"),
        ({"positions": 2.5}, "positions must be"),
        ({"compensate": "no"}, "compensate must be True or False; found 'no'"),
        ({"refit_again": None}, "refit_again must be True or False"),
        ({"round_to": 4.0}, "round_to must be an integer, 1 or more; found 4.0"),
        ({"round_to": True}, "round_to must be"),
        ({"min_keep": 0}, "min_keep must be an integer, 1 or more, or a mapping"),
        ({"min_keep": {"a": "2"}}, "min_keep must be"),
        ({"min_ratio": "0.5"}, "min_ratio must be a finite number from 0 to 1"),
        ({"overrides": ["a"]}, "overrides must be a mapping .*, or None; found"),
        ({"overrides": {"a": 1.5}}, "overrides must be"),
        ({"overrides": {"a": 0.25}, "min_keep": 4}, "keeps 2 of 8 .*'a', but min_keep"),
        ({"steps": "2", "schedule": "linear"}, "steps must be an integer, 1 or more"),
        ({"steps": 2, "schedule": ["linear"]}, "schedule must be 'one-shot', 'linear'"),
        ({"seed": "0"}, "seed must be an integer; found '0'"),
        ({"verify": "no"}, "verify must be True or False"),
        ({"latency_batch": 0}, "latency_batch must be an integer, 1 or more, or None"),
        ({"finetune": 3}, "finetune must be a function, or None; found 3"),
        ({"entropy_threshold": "a", **THRESHOLDS}, "entropy_threshold must be a finit"),
        ({"similarity_threshold": float("nan"), **THRESHOLDS}, "similarity_threshold"),
        ({"allocation": "uniform", **THRESHOLDS}, "allocation shares out a budget"),
        ({"preset": "seed", "round_to": 8, **THRESHOLDS}, "leave out round_to"),
    ],
)
def test_options_of_a_wrong_type_or_method_are_named(given, error):
    with pytest.raises(ConfigError, match=error):
        jp.prune(_hidden, PARAMS, BATCHES, **{"macs": 0.5, **given})


@pytest.mark.parametrize("value", [True, "0.5", float("nan"), 50, np.ones(1), [0.5]])
def test_a_budget_is_one_number(value):
    with pytest.raises(BudgetError, match="macs=.*share that REMAINS"):
        jp.prune(_hidden, PARAMS, BATCHES, macs=value)


@pytest.mark.parametrize("kind", [np.float32, np.array, jnp.float32])
def test_numbers_of_numpy_and_jax_are_a_budget(kind):
    graph = jp.trace(_hidden, PARAMS, BATCHES[0][0])
    plan = jp.select(graph, {"a": np.arange(8.0)}, macs=kind(0.5))
    assert plan["a"].tolist() == [4, 5, 6, 7]


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"bogus": 1}, "select has no option 'bogus'; it takes ignore, min_keep"),
        ({"round_two": 8}, "did you mean 'round_to'"),
        ({"allocation": "uniform"}, "select has no option 'allocation'"),
        ({"round_to": "8"}, "round_to must be an integer"),
        ({"ignore": "a"}, "ignore must be a list of name patterns; found 'a'"),
        ({"groups": ["a"]}, "groups must be Groups of this graph; found .*'a'"),
        ({"groups": 3}, "groups must be Groups of this graph; found"),
    ],
)
def test_wrong_options_of_select_are_named(given, error):
    graph = jp.trace(_hidden, PARAMS, BATCHES[0][0])
    with pytest.raises(ConfigError, match=error):
        jp.select(graph, {"a": np.arange(8.0)}, macs=0.5, **given)
    whole = jp.select(graph, {"a": np.arange(8.0)}, macs=0.5, groups=graph.groups)
    assert whole["a"].size == 4

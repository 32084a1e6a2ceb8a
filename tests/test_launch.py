"""The launcher: every mistake ends in one line on stderr and a status that is not 0."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[1]
COMMAND = [sys.executable, str(ROOT / "launch" / "main.py")]


def environment() -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "TFDS_DATA_DIR": "/nonexistent",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }


def launch(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [*COMMAND, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "give a config file"),
        (["--config=configs/nope.py"], "No such file or directory: 'configs/nope.py'"),
        (["--config=configs/digits.py:metod=x"], "did you mean 'method'?"),
        (
            ["--config=configs/digits.py", "--config.prune.mac=0.3"],
            "unknown config field: mac. Did you mean macs",
        ),
        (
            ["--config=configs/digits.py", "--config.train.epochs=2.5"],
            "--config.train.epochs=2.5",
        ),
        (
            ["--config=configs/vgg16.py"],
            "no prepared TFDS data set 'cifar10' under /nonexistent",
        ),
        (
            ["--config=configs/digits.py", "--workdir=/proc/none"],
            "cannot write to the workdir /proc/none",
        ),
    ],
)
def test_a_mistake_is_one_line_that_names_it(tmp_path, arguments, text):
    if not any("workdir" in a for a in arguments):
        arguments = [*arguments, f"--workdir={tmp_path / 'w'}"]
    result = launch(*arguments)
    assert result.returncode == 1
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ") and text in lines[0]
    assert not (tmp_path / "w" / "config.json").exists()


def test_an_interrupt_that_was_dropped_ends_the_job_at_the_next_step():
    """As in a callback of the garbage collector, which swallows what it raises."""
    program = """
import os, signal, sys
sys.path.insert(0, "launch")
import main
seen = []
progress = main.interruptible(lambda *step: seen.append(step))
progress("train", 1, 3)
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    pass
try:
    progress("train", 2, 3)
except KeyboardInterrupt:
    print(seen)
"""
    found = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment(),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert found.stdout.strip() == "[('train', 1, 3)]"


def test_an_interrupted_run_says_so_and_ends_like_one_that_was_not(tmp_path):
    options = [
        "--config=configs/digits.py:runlocal,method=l1",
        "--config.train.epochs=3",
        "--config.train_examples=300",
        "--config.width=0.5",
    ]
    workdir = tmp_path / "w"
    process = subprocess.Popen(
        [*COMMAND, *options, f"--workdir={workdir}"],
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    metrics = workdir / "metrics.jsonl"
    stop = time.monotonic() + 120
    while not metrics.exists() and time.monotonic() < stop:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert errors.splitlines() == [
        f"error: interrupted; the same command continues from what {workdir} holds"
    ]
    assert launch(*options, f"--workdir={workdir}").returncode == 0
    whole = tmp_path / "whole"
    assert launch(*options, f"--workdir={whole}").returncode == 0
    resumed, expected = (
        json.loads((path / "report.json").read_text()) for path in (workdir, whole)
    )
    for stage in ("base", "pruned", "finetuned"):
        assert resumed[stage]["loss"] == expected[stage]["loss"]

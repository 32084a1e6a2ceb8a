"""The closing files of a job: report.json, report.html and data_stats<S><E>."""

from __future__ import annotations

import pathlib
import subprocess
from typing import Any

import jax

from jaxprune.options import Options, flat
from jaxprune.report import page, read_lines, write_json, write_text
from jaxprune.workdir import Workdir


def commit() -> str:
    """The commit of the code that runs, "unknown" outside a git checkout."""
    here = str(pathlib.Path(__file__).parent)
    command = ["git", "-C", here, "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def write_report(options: Options, workdir: Workdir) -> dict[str, Any]:
    """The record of report.json, written with report.html from the stages' results."""
    device = jax.devices()[0]
    report = {
        "method": options.prune.method,
        "data": options.data,
        "model": options.model,
        "config": flat(options),
        "commit": commit(),
        "device": f"{jax.device_count()} x {device.device_kind} ({device.platform})",
        "seed": options.seed,
        "latency_batch": options.latency_batch,
        "jax": jax.__version__,
        "seconds": {
            stage: record["seconds"] for stage, record in workdir.finished.items()
        },
        **workdir.finished["evaluate"]["results"],
    }
    write_json(workdir.path / "report.json", report)
    metrics = read_lines(workdir.path / "metrics.jsonl")
    write_text(workdir.path / "report.html", page(report, metrics))
    if options.prune.method == "importance_redundancy":
        _write_data_stats(workdir, report)
    return report


def _write_data_stats(workdir: Workdir, report: dict[str, Any]) -> None:
    """data_stats<S><E>, the file of the published script, with its words.

    Its pruning ratio is the MACs before over the MACs after: by the script's own
    formula with the preset, of the whole network otherwise.
    """
    asked = report["asked"]
    similarity, entropy = asked["similarity_threshold"], asked["entropy_threshold"]
    ratio = report["base"]["macs"] / report["finetuned"]["macs"]
    ratio = report.get("seed_ratio", ratio)
    write_text(
        workdir.path / f"data_stats{similarity}{entropy}",
        f"Model Accuracy AFTER REGRESSION  is {report['finetuned']['accuracy']} "
        f"prun_ratio_ach {ratio} SIMILARITY {similarity} ENTROPY {entropy}",
    )

"""The closing table of a job: before and after, in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

Report = Mapping[str, Any]
# Rows: label, key in the report, how a value reads.
ROWS = (
    ("accuracy (test)", "accuracy", lambda v: f"{100 * v:.2f} %"),
    ("MACs", "macs", lambda v: f"{v:,}"),
    ("parameters", "params", lambda v: f"{v:,}"),
    ("bytes", "bytes", lambda v: f"{v:,}"),
    ("latency", "latency_ms", lambda v: f"{v:.2f} ms"),
)
STAGES = ("base", "pruned", "finetuned")


def remaining(report: Report, key: str) -> str:
    """What is left of `key` after all stages: points of accuracy, else percent."""
    before, after = report["base"][key], report["finetuned"][key]
    if key == "accuracy":
        return f"{100 * (after - before):+.2f} points"
    return f"{100 * after / before:.1f} % left" if before else ""


def comparison(report: Report) -> list[list[str]]:
    """Rows of text: label, one value a stage, and what is left at the end."""
    return [
        [label, *(show(report[stage][key]) for stage in STAGES), remaining(report, key)]
        for label, key, show in ROWS
    ]


def table(report: Report, *, paths: Mapping[str, str]) -> Group:
    """A rich renderable: the comparison, the widths, and what was written where."""
    totals = Table(title=f"{report['model']} on {report['data']}, {report['method']}")
    totals.add_column("")
    for stage in STAGES:
        totals.add_column(stage, justify="right")
    totals.add_column("in the end", justify="right")
    for row in comparison(report):
        totals.add_row(*row)
    widths = Table(title="channels kept")
    widths.add_column("group")
    widths.add_column("before", justify="right")
    widths.add_column("after", justify="right")
    for group in report["groups"]:
        widths.add_row(group["name"], str(group["size"]), str(group["kept"]))
    lines = [
        f"latency is of a batch of {report['latency_batch']} on {report['device']}",
        f"masked original against slim model: {report['verify_max_abs_error']:.2e}",
        *(f"{what}: {path}" for what, path in paths.items()),
    ]
    return Group(totals, widths, Text("\n".join(lines)))

"""Plots of a report as SVG text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

_COLOURS = ("#9aa5b1", "#2a6f97")


def plots(report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """SVG elements: widths by group, and accuracy by epoch; [] without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return []

    def svg(figure: Any) -> str:
        text = io.StringIO()
        figure.savefig(text, format="svg", bbox_inches="tight")
        return text.getvalue()[text.getvalue().index("<svg") :]

    names = [group["name"] for group in report["groups"]]
    figure = Figure(figsize=(9, 3.2))
    axes = figure.subplots()
    for key, label, colour in zip(
        ("size", "kept"), ("before", "after"), _COLOURS, strict=True
    ):
        values = [group[key] for group in report["groups"]]
        axes.bar(names, values, color=colour, label=label)
    axes.set_ylabel("channels")
    axes.tick_params(axis="x", rotation=60 if len(names) > 8 else 0)
    axes.legend(frameon=False)
    drawn = [svg(figure)]
    measured = [m for m in metrics if "validation_accuracy" in m]
    if measured:
        figure = Figure(figsize=(9, 3.2))
        axes = figure.subplots()
        for stage in dict.fromkeys(m["stage"] for m in measured):
            rows = [m for m in measured if m["stage"] == stage]
            axes.plot(
                [m["epoch"] for m in rows],
                [100 * m["validation_accuracy"] for m in rows],
                label=stage,
            )
        axes.set_xlabel("epoch")
        axes.set_ylabel("validation accuracy, %")
        axes.legend(frameon=False)
        drawn.append(svg(figure))
    return drawn

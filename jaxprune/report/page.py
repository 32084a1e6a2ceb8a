"""report.html: the comparison, the plots and the whole record, in one file."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxprune.report.plots import plots
from jaxprune.report.table import STAGES, comparison

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto;
  padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right }
td:first-child, th:first-child { text-align: left }
svg { max-width: 100%; height: auto }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px }
"""


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def row(cells: Sequence[Any], tag: str) -> str:
        text = "".join(f"<{tag}>{html.escape(str(c))}</{tag}>" for c in cells)
        return f"<tr>{text}</tr>"

    lines = [row(head, "th"), *(row(cells, "td") for cells in rows)]
    return f"<table>{''.join(lines)}</table>"


def page(report: Mapping[str, Any], metrics: Sequence[Mapping[str, Any]]) -> str:
    """The text of a self-contained HTML page.

    Args:
      report: the record of report.json.
      metrics: one record an epoch, as in metrics.jsonl.
    """
    title = f"{report['model']} on {report['data']}, {report['method']}"
    kept = [
        (g["name"], g["size"], g["kept"], f"{100 * g['kept'] / g['size']:.0f} %")
        for g in report["groups"]
    ]
    seconds = [(stage, f"{value:.1f}") for stage, value in report["seconds"].items()]
    drawn = plots(report, metrics)
    if not drawn:
        drawn = ["<p>Install matplotlib for plots: pip install 'jaxprune[report]'.</p>"]
    parts = [
        f"<h1>{html.escape(title)}</h1>",
        (
            f"<p>{html.escape(report['device'])}, seed {report['seed']}, "
            f"commit {html.escape(str(report['commit']))}</p>"
        ),
        _table(["", *STAGES, "in the end"], comparison(report)),
        *drawn,
        "<h2>Channels kept</h2>",
        _table(["group", "before", "after", ""], kept),
        "<h2>Seconds</h2>",
        _table(["stage", "s"], seconds),
        "<h2>Record</h2>",
        f"<pre>{html.escape(json.dumps(report, indent=2))}</pre>",
    ]
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8>"
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style>"
        f"<body>{''.join(parts)}</body></html>\n"
    )

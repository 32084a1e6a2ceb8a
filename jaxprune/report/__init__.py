"""What a job shows and leaves behind: progress, tables, JSON and a page with plots."""

from jaxprune.report.files import append_line, read_lines, write_json, write_text
from jaxprune.report.page import page
from jaxprune.report.progress import progress
from jaxprune.report.table import table

__all__ = [
    "append_line",
    "page",
    "progress",
    "read_lines",
    "table",
    "write_json",
    "write_text",
]

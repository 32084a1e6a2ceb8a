"""Text files that are replaced whole, and logs that grow by a line."""

from __future__ import annotations

import json
import os
import pathlib
from typing import Any

from jaxprune.errors import CheckpointError, first_line


def write_text(path: pathlib.Path, text: str) -> None:
    """Replaces the file `path` by `text`, whole or not at all.

    Raises:
      CheckpointError: it cannot be written; the old file stays.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(text)
        os.replace(partial, path)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {first_line(error)}; check that the directory is "
            "writable and the disk has space"
        ) from error


def write_json(path: pathlib.Path, record: Any) -> None:
    """Replaces the file `path` by `record` as JSON, whole or not at all."""
    write_text(path, json.dumps(record, indent=2) + "\n")


def append_line(path: pathlib.Path, record: Any) -> None:
    """Adds `record` to the file `path` as one line of JSON."""
    try:
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {first_line(error)}; check that the directory is "
            "writable and the disk has space"
        ) from error


def read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    """The records of `append_line`, the last one of each stage and epoch.

    A run that was killed and continued repeats an epoch, and may have left half a
    line.
    """
    if not path.exists():
        return []
    records = {}
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        records[record.get("stage"), record.get("epoch")] = record
    return list(records.values())

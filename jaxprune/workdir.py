"""The directory of a job: which stages are finished, and with which options."""

from __future__ import annotations

import json
import pathlib
from typing import Any

from jaxprune.errors import CheckpointError, ConfigError, first_line
from jaxprune.report import write_json

# Where the data lie may change between two runs; what they are may not.
_MAY_DIFFER = {"data_dir"}


class Workdir:
    """Files of a job, and the record of its finished stages in stages.json.

    Opening one creates it, proves that it can be written, and compares the options
    with those it was made with.
    """

    def __init__(self, path: str, options: dict[str, Any]) -> None:
        self.path = pathlib.Path(path).expanduser().absolute()
        self._stages = self.path / "stages.json"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            probe = self.path / ".probe"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise ConfigError(
                f"cannot write to the workdir {self.path}: {first_line(error)}; "
                "choose another with --workdir"
            ) from error
        # JSON has no tuples and may respell a number: compare what was read back.
        self._options = json.loads(json.dumps(options))
        self._compare()
        self.finished: dict[str, Any] = self._read(self._stages) or {}

    def _read(self, path: pathlib.Path) -> Any:
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot read {path}: {first_line(error)}; remove the workdir, or "
                "choose another with --workdir"
            ) from error

    def _compare(self) -> None:
        asked = self._options
        made = self._read(self.path / "config.json")
        if made is None:
            return
        changed = [
            f"{name}: {made.get(name)!r} there, {asked.get(name)!r} now"
            for name in sorted(made.keys() | asked.keys())
            if made.get(name) != asked.get(name) and name not in _MAY_DIFFER
        ]
        if changed:
            raise ConfigError(
                f"the workdir {self.path} was made with another configuration "
                f"({'; '.join(changed)}); choose another with --workdir, or remove it"
            )

    def begin(self) -> None:
        """Ties the directory to the options, once it is known that they work."""
        write_json(self.path / "config.json", self._options)

    def finish(self, stage: str, record: dict[str, Any]) -> None:
        """Marks `stage` as finished, with a JSON-ready record of its results."""
        self.finished[stage] = record
        write_json(self._stages, self.finished)

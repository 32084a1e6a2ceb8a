"""The state of a training run, kept after each epoch."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxprune import trees
from jaxprune.errors import CheckpointError, ConfigError, first_line


class EpochCheckpoints:
    """Keeps the newest state of a training run; does nothing without a directory.

    A state appears under its final name only when it is complete, so a run killed
    while saving continues from the state before.
    """

    def __init__(self, directory: str | None, settings: dict[str, Any]) -> None:
        self._manager: ocp.CheckpointManager | None = None
        if directory is None:
            return
        self._directory = pathlib.Path(directory).absolute()
        self._settings = settings
        options = ocp.CheckpointManagerOptions(
            max_to_keep=1, create=True, enable_async_checkpointing=False
        )
        try:
            self._manager = ocp.CheckpointManager(self._directory, options=options)
        except OSError as error:
            raise CheckpointError(
                f"cannot write checkpoints to {self._directory}: {error}; choose "
                "another directory"
            ) from error

    def restore(self, state: Any) -> tuple[int, Any]:
        """(epochs done, state then), or (0, `state`) where nothing was kept."""
        epoch = self._manager.latest_step() if self._manager else None
        if self._manager is None or epoch is None:
            return 0, state
        arrays = jax.device_get(state)
        try:
            # Settings first: orbax cuts or pads an array to the shape it is asked for.
            kept = self._manager.restore(
                epoch, args=ocp.args.Composite(settings=ocp.args.JsonRestore())
            )["settings"]
            self._compare(kept, self._record(arrays))
            found = self._manager.restore(
                epoch,
                args=ocp.args.Composite(state=ocp.args.StandardRestore(arrays)),
            )
        except (ValueError, KeyError, OSError) as error:
            raise CheckpointError(
                f"cannot read epoch {epoch} in {self._directory}: {first_line(error)}; "
                "it is damaged, remove the directory to start again"
            ) from error
        return epoch, found["state"]

    def _record(self, state: Any) -> dict[str, Any]:
        """What must agree for a run to continue: the settings and all shapes."""
        shapes = {n: list(np.shape(a)) for n, a in trees.flatten(state).items()}
        return {**self._settings, **shapes}

    def _compare(self, kept: dict[str, Any], asked: dict[str, Any]) -> None:
        changed = [
            f"{name}: {kept.get(name)} -> {asked.get(name)}"
            for name in sorted(kept.keys() | asked.keys())
            if kept.get(name) != asked.get(name)
        ]
        if changed:
            more = f" and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise ConfigError(
                f"the run in {self._directory} was started with another model or "
                f"other settings ({'; '.join(changed[:5])}{more}); use those, or "
                "another directory"
            )

    def save(self, epoch: int, state: Any) -> None:
        """Keeps `state` as the one after `epoch` epochs, and drops older ones.

        Raises:
          CheckpointError: it cannot be written; the one before stays.
        """
        if self._manager is None:
            return
        arrays = jax.device_get(state)
        try:
            self._manager.save(
                epoch,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(arrays),
                    settings=ocp.args.JsonSave(self._record(arrays)),
                ),
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"cannot write the checkpoint of epoch {epoch} to {self._directory}: "
                f"{first_line(error)}; free space there and start again, it will continue from "
                "the last one"
            ) from error

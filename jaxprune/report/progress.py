"""A progress bar in the terminal for everything that takes a while."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A function (stage, done, total) that draws one bar a stage while in use.

    A stage that starts again from a smaller number gets a new bar; finished bars stay
    on the screen. Where output is not a terminal only the finished bars are printed.
    """
    bars = Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    tasks: dict[str, tuple[TaskID, int]] = {}

    def advance(stage: str, done: int, total: int) -> None:
        task, before = tasks.get(stage, (None, 0))
        if task is None or done < before:
            task = bars.add_task(stage, total=total)
        bars.update(task, completed=done)
        tasks[stage] = (task, done)

    with bars:
        yield advance

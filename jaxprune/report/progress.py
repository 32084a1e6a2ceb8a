"""Progress of everything that takes a while: bars in a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import time
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

Advance = Callable[[str, int, int], None]
LINE_SECONDS = 60.0  # between two lines of a stage in a log


@contextlib.contextmanager
def progress(
    console: Console, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Advance]:
    """A function (stage, done, total) that shows how far each stage is while in use.

    In a terminal one bar a stage: one that starts again from a smaller number gets a
    new bar, and finished bars stay on the screen. Where output goes to a file or a
    job's log, a line a minute for stages that take longer than that.
    """
    if not console.is_terminal:
        yield _lines(console, clock)
        return
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


def _lines(console: Console, clock: Callable[[], float]) -> Advance:
    """As `progress`, in lines: "train 1200 of 1910, 25 min, about 15 min left"."""
    # Stage -> (when it began, done then, when it last had a line, done last).
    stages: dict[str, tuple[float, int, float, int]] = {}

    def advance(stage: str, done: int, total: int) -> None:
        now = clock()
        began, first, told, last = stages.get(stage, (now, done, now, done))
        if done < last:
            began, first, told = now, done, now
        if now - told >= LINE_SECONDS and done > first:
            spent = now - began
            left = spent * (total - done) / (done - first)
            console.print(
                f"{stage} {done} of {total}, {_span(spent)}, about {_span(left)} left",
                highlight=False,
            )
            told = now
        stages[stage] = (began, first, told, done)

    return advance


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"

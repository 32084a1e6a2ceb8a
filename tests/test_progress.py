"""Progress: a line a minute in a log, a bar a stage in a terminal."""

import io

import pytest
from rich.console import Console

from jaxprune import report


def _console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=80)


def _log(steps):
    """What a log shows of (seconds, stage, done, total)."""
    console, now = _console(False), [0.0]
    with report.progress(console, clock=lambda: now[0]) as advance:
        for seconds, *step in steps:
            now[0] = seconds
            advance(*step)
    return console.file.getvalue().splitlines()


def test_a_log_has_a_line_a_minute():
    steps = [(10.0 * k, "train", k, 40) for k in range(41)]
    lines = _log(steps)
    assert lines[0] == "train 6 of 40, 60 s, about 6 min left"
    assert lines[-1] == "train 36 of 40, 6 min, about 40 s left"
    assert len(lines) == 6


def test_short_stages_leave_no_line_and_a_new_round_starts_afresh():
    assert _log([(k, "evaluate", k, 50) for k in range(51)]) == []
    first = [(50.0 * k, "layer", k, 4) for k in range(1, 3)]
    again = [(1000.0, "layer", 1, 4), (1070.0, "layer", 2, 4)]
    assert _log(first + again) == ["layer 2 of 4, 70 s, about 2 min left"]


@pytest.mark.parametrize("total", [1, 7])
def test_a_terminal_has_a_bar_a_stage(total):
    console = _console(True)
    with report.progress(console) as advance:
        for k in range(total + 1):
            advance("prune", k, total)
    assert f"{total}/{total}" in console.file.getvalue()

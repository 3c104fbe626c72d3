"""Progress as text: plain lines in a log, bars on a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from jobs.progress import Progress, clock


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0s"), (59.6, "1m00s"), (75, "1m15s"), (3700, "1h01m")])
def test_durations(seconds: float, shown: str) -> None:
    assert clock(seconds) == shown


def test_a_log_gets_the_first_and_the_last_line_without_control_characters() -> None:
    out = io.StringIO()
    with Progress(Console(file=out)).bar("delta studies", 3, "trials") as bar:
        bar.advance()
        bar.note("trial 1: step 5")
        bar.advance(2)
    lines = out.getvalue().splitlines()
    assert lines == ["  delta studies: 3 trials", "  delta studies: 3/3 trials"]
    assert "\x1b" not in out.getvalue()


def test_a_terminal_gets_a_bar_with_a_note() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=140)
    with Progress(console).bar("LoRA study", 4, "trials") as bar:
        bar.advance()
        bar.note("trial 1: step 15, val_loss 0.14")
    assert "LoRA study" in out.getvalue()
    assert "1/4" in out.getvalue()
    assert "val_loss 0.14" in out.getvalue()


def test_nothing_to_do_prints_nothing() -> None:
    out = io.StringIO()
    with Progress(Console(file=out)).bar("base errors", 0, "bases"):
        pass
    assert out.getvalue() == ""

"""Progress as text: plain lines in a log, bars on a terminal."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import time
from pathlib import Path

import pytest
from rich.console import Console

from jobs.progress import FILE, Progress, clock, read_progress


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


def test_the_time_left_goes_by_cost_and_not_by_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    with Progress(Console(file=io.StringIO())).bar("evaluation", 50, "cells", 100.0) as bar:
        bar.start_at(10)
        assert bar.seconds_left() is None
        now = 130.0
        bar.advance(2, cost=20.0)
        assert bar.seconds_left() == pytest.approx(30 / 20 * 80)
        bar.advance(2, cost=10.0, running=2)  # two more that are half done
        assert bar.seconds_left() == pytest.approx(30 / 40 * 60)
        bar.advance(36, cost=70.0)
        assert bar.seconds_left() is None
    with Progress(Console(file=io.StringIO())).bar("delta studies", 50, "trials") as bar:
        bar.start_at(40)
        now = 140.0
        bar.advance(5)
        assert bar.seconds_left() == pytest.approx(10.0)


def test_nothing_to_do_prints_nothing() -> None:
    out = io.StringIO()
    with Progress(Console(file=out)).bar("base errors", 0, "bases"):
        pass
    assert out.getvalue() == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_a_running_sweep_says_in_its_folder_what_it_shows(tmp_path: Path, terminal: bool) -> None:
    progress = Progress(Console(file=io.StringIO(), force_terminal=terminal))
    assert read_progress(tmp_path) is None
    with progress.kept_in(tmp_path):
        progress.stage("[4/6] deltas")
        shown = read_progress(tmp_path)
        assert (shown["stage"], shown["bars"], shown["running"]) == ("[4/6] deltas", [], True)
        with progress.bar("delta studies", 3, "trials") as bar:
            bar.advance()
            progress.save(at_once=True)
            (text,) = read_progress(tmp_path)["bars"]
            assert text.startswith("delta studies: 1/3 trials, about ")
        progress.save(at_once=True)
        assert read_progress(tmp_path)["bars"] == []
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_progress_file_is_none(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text("{")
    assert read_progress(tmp_path) is None


def test_after_a_kill_its_last_word_is_there(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    told = {"host": socket.gethostname(), "pid": ended.pid, "at": time.time(), "stage": "[2/6] lora", "bars": []}
    (tmp_path / FILE).write_text(json.dumps(told))
    assert read_progress(tmp_path) == {**told, "running": False}
    (tmp_path / FILE).write_text(json.dumps(told | {"host": "elsewhere"}))
    assert read_progress(tmp_path)["running"]
    (tmp_path / FILE).write_text(json.dumps(told | {"host": "elsewhere", "at": time.time() - 1000}))
    assert not read_progress(tmp_path)["running"]

"""Progress on the terminal: stage, units done, time left; plain lines if the output is not a terminal.

In: counts from the stages. Out: text, and a small file with the same content for `status`. Nothing else in the project
prints while a sweep runs.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from data.files import replacing

PLAIN_PERIOD_SECONDS = 10.0
PLAIN_COLUMNS = 120
FILE_PERIOD_SECONDS = 1.0
QUIET_SECONDS = 300
"""A driver on another machine that is silent for longer counts as gone; one unit of work can take minutes."""
FILE = ".progress.json"
"""What the driver shows, in the folder of a running sweep."""


class Bar:
    """One line of progress. If units take unequal times, `cost` is the total cost of the units left to do, on any
    scale; the time left is then estimated from the share of it that is done."""

    def __init__(self, show: Progress, label: str, total: int, unit: str, cost: float = 0.0) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self.note_text = ""
        self._has_cost, self._whole = bool(cost), cost or float(total)
        self._to_do = self._whole
        self._credit = 0.0
        self._show = show
        self._started = self._printed = time.monotonic()
        self._task = None
        if show.bars is not None:
            self._task = show.bars.add_task(label, total=total, unit=unit, note="", left="")
        elif total:
            show.line(f"  {label}: {total} {unit}")

    def start_at(self, done: int) -> None:
        """`done` units were finished before this run, so they do not count towards its speed."""
        if not self._has_cost:
            self._whole = self._to_do = float(self.total - done)
        self._update(done, "")

    def advance(self, count: int = 1, cost: float = 0.0, running: int = 0) -> None:
        """`count` units of cost `cost` are done; `running` similar ones are assumed to be half done."""
        self._to_do -= cost or count
        self._credit = min(self._to_do, 0.5 * running * (cost or count))
        self._update(self.done + count, "")

    def _update(self, done: int, note: str) -> None:
        self.done, self.note_text = done, note
        self._show.save()
        if self._show.bars is not None and self._task is not None:
            left = self.seconds_left()
            shown = "" if left is None else f"about {clock(left)} left"
            self._show.bars.update(self._task, completed=done, note=note, left=shown)
            return
        now = time.monotonic()
        if now - self._printed >= PLAIN_PERIOD_SECONDS or done >= self.total:
            self._printed = now
            self._show.line(f"  {self.text()}")

    def text(self) -> str:
        """`delta studies: 12/60 trials, about 1m20s left (trial 13: step 5)`."""
        left = self.seconds_left()
        tail = "" if left is None else f", about {clock(left)} left"
        note = self.note_text and f" ({self.note_text})"
        return f"{self.label}: {self.done}/{self.total} {self.unit}{tail}{note}"

    def seconds_left(self) -> float | None:
        """None at both ends: there is no estimate before this run has finished a unit."""
        spent = self._whole - self._to_do + self._credit
        if spent <= 0 or self.done >= self.total:
            return None
        return (time.monotonic() - self._started) * (self._to_do - self._credit) / spent

    def note(self, text: str) -> None:
        """Shows what is happening within a unit, such as a running trial's loss."""
        self._update(self.done, text)

    def line(self, text: str) -> None:
        """Prints `text` on a line of its own, which stays on screen."""
        self._show.line(f"  {text}")


class Progress:
    """The one place that writes to the terminal during a sweep."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        if not self.console.is_terminal:
            self.console.width = PLAIN_COLUMNS
        self.bars: Bars | None = None
        self._stage, self._saved = "", -FILE_PERIOD_SECONDS
        self._file: Path | None = None
        self._open: list[Bar] = []

    def stage(self, label: str) -> None:
        """Prints the name of the stage that begins."""
        self._stage = label
        self.line(label)
        self.save(at_once=True)

    @contextmanager
    def kept_in(self, folder: Path) -> Iterator[None]:
        """While a sweep runs, also writes what is shown to `folder`, for `read_progress`."""
        file = self._file = folder / FILE
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            self._file = None

    def save(self, *, at_once: bool = False) -> None:
        """Writes the file, if there is one, at most once per `FILE_PERIOD_SECONDS` unless `at_once`."""
        now = time.monotonic()
        if self._file is None or (now - self._saved < FILE_PERIOD_SECONDS and not at_once):
            return
        self._saved = now
        driver = {"host": socket.gethostname(), "pid": os.getpid(), "at": time.time()}
        state = {**driver, "stage": self._stage, "bars": [bar.text() for bar in self._open]}
        # A full disk is reported where results are written.
        with suppress(OSError), replacing(self._file) as temporary:
            temporary.write_text(json.dumps(state))

    def line(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, label: str, total: int, unit: str, cost: float = 0.0) -> Iterator[Bar]:
        """A `Bar` of `total` units; several may be open at once."""
        if not self.console.is_terminal:
            with self._opened(Bar(self, label, total, unit, cost)) as bar:
                yield bar
            return
        outermost = self.bars is None
        if outermost:
            self.bars = Bars(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("{task.fields[left]}"),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self.bars.start()
        try:
            with self._opened(Bar(self, label, total, unit, cost)) as bar:
                yield bar
        finally:
            if outermost and self.bars is not None:
                self.bars.stop()
                self.bars = None

    @contextmanager
    def _opened(self, bar: Bar) -> Iterator[Bar]:
        self._open.append(bar)
        self.save(at_once=True)
        try:
            yield bar
        finally:
            self._open.remove(bar)


def read_progress(folder: Path) -> dict[str, Any] | None:
    """What a sweep's driver last showed: `stage`, a text for each of `bars`, and whether it seems to be `running`. None
    if it has ended. After a kill this is the last state written."""
    try:
        state = json.loads((folder / FILE).read_text())
        here = state["host"] == socket.gethostname()
        running = psutil.pid_exists(state["pid"]) if here else time.time() - state["at"] < QUIET_SECONDS
        _ = state["stage"], state["bars"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return {**state, "running": running}


def clock(seconds: float) -> str:
    """`75` -> `1m15s`."""
    minutes, seconds_left = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{seconds_left:02d}s" if minutes else f"{seconds_left}s"

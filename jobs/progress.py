"""Progress on the terminal: stage, units done, time left; plain lines if the output is not a terminal.

In: counts from the stages. Out: text. Nothing else in the project prints while a sweep runs.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

PLAIN_PERIOD_SECONDS = 10.0
PLAIN_COLUMNS = 120


class Bar:
    """One line of progress."""

    def __init__(self, show: Progress, label: str, total: int, unit: str) -> None:
        self.label, self.total, self.unit, self.done = label, total, unit, 0
        self._show = show
        self._started = self._printed = time.monotonic()
        self._task = None
        if show.bars is not None:
            self._task = show.bars.add_task(label, total=total, unit=unit, note="")
        elif total:
            show.line(f"  {label}: {total} {unit}")

    def advance(self, count: int = 1) -> None:
        self.update(self.done + count)

    def update(self, done: int, note: str = "") -> None:
        """`note` says what is happening between two units, such as a running trial's loss."""
        self.done = done
        if self._show.bars is not None and self._task is not None:
            self._show.bars.update(self._task, completed=done, note=note)
            return
        now = time.monotonic()
        if now - self._printed >= PLAIN_PERIOD_SECONDS or done >= self.total:
            self._printed = now
            left = (now - self._started) / max(done, 1) * (self.total - done)
            tail = f", about {clock(left)} left" if 0 < done < self.total else ""
            self._show.line(f"  {self.label}: {done}/{self.total} {self.unit}{tail}{note and f' ({note})'}")

    def note(self, text: str) -> None:
        self.update(self.done, text)

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

    def line(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def bar(self, label: str, total: int, unit: str) -> Iterator[Bar]:
        """A bar of `total` units; several may be open at once."""
        if not self.console.is_terminal:
            yield Bar(self, label, total, unit)
            return
        outermost = self.bars is None
        if outermost:
            self.bars = Bars(
                TextColumn("  {task.description}"),
                BarColumn(bar_width=30),
                MofNCompleteColumn(),
                TextColumn("{task.fields[unit]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[note]}"),
                console=self.console,
            )
            self.bars.start()
        try:
            yield Bar(self, label, total, unit)
        finally:
            if outermost and self.bars is not None:
                self.bars.stop()
                self.bars = None


def clock(seconds: float) -> str:
    """`75` -> `1m15s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h{minutes:02d}m"
    return f"{minutes}m{rest:02d}s" if minutes else f"{rest}s"

"""Sweeps side by side: on the terminal, as CSV, as JSON, and as a page.

In: the places of finished sweeps. Out: their comparison, written to the requested files.
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.files import replacing
from evaluators.tables.compared_sweeps import ComparedSweep, repeated, settings_that_differ
from jobs.commands.finished_sweeps import Sources, read_sweeps
from jobs.context.workspace import storage_root
from jobs.errors import RequestError

if TYPE_CHECKING:
    from rich.console import Console

    from evaluators.report.page import Table

FOLDER = "comparisons"
"""The folder of the pages, under a storage root."""
LONGEST_NAME = 120
FIRST_COLUMN, COLUMN = 24, 26
"""Width in characters of a table's first column, and of each sweep's, on the terminal."""


@dataclass(frozen=True)
class Comparison:
    """The sweeps, and notes on what is missing or doubtful."""

    sweeps: Sequence[ComparedSweep]
    notes: list[str] = field(default_factory=list)


def compare(sources: Sources) -> Comparison:
    """Reads the sweeps; raises RequestError as `read_sweeps` does."""
    sweeps, notes = read_sweeps(sources)
    notes += [f"{name} and {twin} share every setting, the seed too." for name, twin in repeated(sweeps)]
    for sweep in sweeps:
        if sweep.layers and sweep.dose.empty:
            notes.append(f"{sweep.name} has no strengths (evaluate.alphas) in its widest set, so it has no knob.")
    return Comparison(sweeps, notes)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """The comparison as plain values."""
    from evaluators.report.comparison_page import records

    names = [sweep.name for sweep in comparison.sweeps]
    return {
        "sweeps": [
            {"name": sweep.name, "seed": sweep.seed, "layers": sweep.layers, "from": sweep.where}
            for sweep in comparison.sweeps
        ],
        "settings that differ": {
            key: dict(zip(names, values, strict=True))
            for key, values in settings_that_differ(comparison.sweeps).items()
        },
        "figures": records(comparison.sweeps),
        "notes": comparison.notes,
    }


def as_csv(comparison: Comparison) -> str:
    """Every figure as one row, those pooled over seeds at the end."""
    from evaluators.report.comparison_page import records

    rows, text = records(comparison.sweeps), io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def as_page(comparison: Comparison) -> str:
    from evaluators.report.comparison_page import page

    return page(comparison.sweeps, comparison.notes)


def page_path(root: str, comparison: Comparison) -> Path:
    """The default path of the page, named after the sweeps."""
    names = "_".join(
        "".join(char if char.isalnum() or char in "-." else "-" for char in s.name) for s in comparison.sweeps
    )
    if len(names) > LONGEST_NAME:
        names = f"{names[:LONGEST_NAME]}-{hashlib.sha256(names.encode()).hexdigest()[:8]}"
    return storage_root(root) / FOLDER / f"{names}.html"


def write(path: Path, text: str, key: str) -> Path:
    """Writes atomically. Raises RequestError if `path` cannot be written."""
    path = path.expanduser().absolute()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RequestError(f"{key}: {path} cannot be written ({error.strerror})") from None
    return path


def show(comparison: Comparison, console: Console) -> None:
    """The tables of the page on the terminal, as many sweeps side by side as fit."""
    from evaluators.report import comparison_page

    per_table = max(1, (console.width - FIRST_COLUMN) // COLUMN)
    for table in [comparison_page.differing(comparison.sweeps), *comparison_page.side_by_side(comparison.sweeps)]:
        for first in range(1, len(table.header), per_table):
            _print(table, [0, *range(first, min(first + per_table, len(table.header)))], console)
    pooled = comparison_page.pooled_tables(comparison.sweeps)
    for table in pooled:
        _print(table, range(len(table.header)), console)
    if pooled:
        console.print(comparison_page.spread_note(comparison.sweeps), highlight=False, markup=False)
    for note in comparison.notes:
        console.print(f"note: {note}", highlight=False, markup=False)


def _print(table: Table, columns: Sequence[int], console: Console) -> None:
    from rich.table import Table as Shown
    from rich.text import Text

    console.print(Text(f"{table.title}. {table.help}"), highlight=False)
    shown = Shown()
    for column in columns:
        shown.add_column(Text(table.header[column]))
    for row in table.rows:
        shown.add_row(*(Text(str(row[column])) for column in columns))
    console.print(shown)

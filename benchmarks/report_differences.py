"""How far the figures of two reports of one sweep differ: after a change of the code, or evaluated in bf16.

    python -m benchmarks.report_differences mlruns/sweeps/quickstart/report OTHER/report

In: the folders of two reports whose tables have the same rows. Out: for each table the number of its figures and how
many are equal to the last digit, and for each column that is not, the largest difference, by itself and as a share of
half the figure's 95% interval in the first report.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import pandas as pd
import typer

TIMES = ("seconds", "cpu_seconds")
"""Columns that differ from run to run."""


class Difference(NamedTuple):
    """A column: how many of its figures differ, by how much at most, and by which share of half an interval at most
    (NaN for a column without intervals)."""

    column: str
    number: int
    largest: float
    share: float


def differences(first: pd.DataFrame, second: pd.DataFrame) -> Iterator[Difference]:
    """The columns in which two tables differ. Raises ValueError if they have other rows or columns."""
    if first.shape != second.shape or list(first) != list(second):
        raise ValueError(f"{first.shape[0]} rows and {first.shape[1]} columns in one, {second.shape} in the other")
    for column in first:
        if column in TIMES:
            continue
        a, b = first[column], second[column]
        if not (pd.api.types.is_numeric_dtype(a) and pd.api.types.is_numeric_dtype(b)):
            count = int((a.fillna("").astype(str) != b.fillna("").astype(str)).sum())
            if count:
                yield Difference(column, count, np.nan, np.nan)
            continue
        apart = (a.astype(float) - b.astype(float)).abs()
        count = int(((apart > 0) | (a.isna() != b.isna())).sum())
        if count:
            yield Difference(column, count, apart.max(), _share(first, column, apart))


def _share(table: pd.DataFrame, column: str, apart: pd.Series) -> float:
    ends = [f"{column}_low", f"{column}_high"]
    if not set(ends) <= set(table):
        return np.nan
    half = (table[ends[1]] - table[ends[0]]) / 2
    return float((apart / half.where(half > 0)).max())


def main(
    report: Annotated[Path, typer.Argument(help="The folder of a report, whose intervals count.")],
    other: Annotated[Path, typer.Argument(help="The folder of the report to compare.")],
) -> None:
    """Prints how far the figures of two reports differ."""
    names = sorted(path.name for path in report.glob("*.csv") if (other / path.name).is_file())
    if not names:
        typer.echo(f"error: {report} and {other} have no table in common", err=True)
        raise typer.Exit(2)
    for name in names:
        first, second = (pd.read_csv(folder / name) for folder in (report, other))
        try:
            differing = list(differences(first, second))
        except ValueError as error:
            typer.echo(f"{name}: {error}")
            continue
        typer.echo(f"{name}: {first.size} values, {sum(column.number for column in differing)} differ")
        for column in differing:
            share = "" if np.isnan(column.share) else f", at most {column.share:.2g} of half an interval"
            typer.echo(f"  {column.column}: {column.number}, by at most {column.largest:.3g}{share}")


if __name__ == "__main__":
    typer.run(main)

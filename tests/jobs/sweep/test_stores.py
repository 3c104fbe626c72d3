"""Which journals and databases count as damaged."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest

from jobs.search.studies import journal_problem, open_storage
from jobs.sweep.stores import database_problem


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    storage = open_storage(None, tmp_path)
    for name in ("one", "two"):
        study = optuna.create_study(study_name=name, storage=storage)
        study.tell(study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}), 0.5)
    return tmp_path / "optuna" / "journal.log"


def middle(put: bytes) -> Callable[[bytes], bytes]:
    return lambda data: data[: len(data) // 2] + put + data[len(data) // 2 + len(put) :]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda data: data, None),
        (lambda data: b"", None),
        (lambda data: data[:-20], "ends in the middle of a line"),
        (middle(b"\xff\xfe"), "cannot be opened (UnicodeDecodeError)"),
        (middle(b"}{}{}{"), "cannot be opened (JSONDecodeError)"),
    ],
)
def test_journals(journal: Path, change: Callable[[bytes], bytes], why: str | None) -> None:
    journal.write_bytes(change(journal.read_bytes()))
    assert journal_problem(journal) == why


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "a folder?" / "mlflow.db"
    path.parent.mkdir()
    store = sqlite3.connect(path)
    store.execute("CREATE TABLE runs (name TEXT)")
    store.executemany("INSERT INTO runs VALUES (?)", [(f"run {number}" * 40,) for number in range(500)])
    store.commit()
    store.close()
    return path


def test_a_sound_database_and_an_empty_one(database: Path) -> None:
    assert database_problem(database) is None
    database.write_bytes(b"")
    assert database_problem(database) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"x" * 100 + data[100:],
        lambda data: data[:4096] + b"\xff" * 4096 + data[8192:],
        lambda data: b"no database",
    ],
)
def test_damaged_databases(database: Path, change: Callable[[bytes], bytes]) -> None:
    database.write_bytes(change(database.read_bytes()))
    assert database_problem(database)


def test_one_that_is_being_written_to_is_not_damaged(database: Path) -> None:
    writer = sqlite3.connect(database)
    writer.execute("BEGIN IMMEDIATE")
    writer.execute("INSERT INTO runs VALUES ('new')")
    try:
        assert database_problem(database) is None
    finally:
        writer.close()

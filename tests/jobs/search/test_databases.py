"""A database that studies cannot be kept in is named in one sentence, without user and password."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from jobs.context.context import Context
from jobs.errors import RequestError
from jobs.search.databases import is_file, open_database
from search_spaces.load import load

SECRETS = ("me-myself", "s3cret", "s3", "cret")


def refusal(url: str) -> str:
    with pytest.raises(RequestError) as caught:
        open_database(url)
    said = str(caught.value)
    assert said.startswith("storage.optuna_url: ")
    assert "\n" not in said
    assert not [secret for secret in SECRETS if secret in said]
    return said


@pytest.mark.parametrize(
    ("kind", "module", "package"),
    [
        ("postgresql", "psycopg", "psycopg[binary]"),
        ("postgresql+psycopg", "psycopg", "psycopg[binary]"),
        ("postgresql+psycopg2", "psycopg2", "psycopg2-binary"),
        ("postgresql+pg8000", "pg8000", "pg8000"),
        ("mysql", "MySQLdb", "mysqlclient"),
        ("mysql+pymysql", "pymysql", "PyMySQL"),
        ("mysql+mysqlconnector", "mysql", "mysql-connector-python"),
    ],
)
def test_a_missing_driver_is_named_with_its_package(
    kind: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed
    said = refusal(f"{kind}://me-myself:s3cret@db.internal/studies")
    assert f"{kind}:// " in said
    assert f"module {module};" in said
    assert f"pip install '{package}'" in said


@pytest.mark.parametrize(
    ("url", "fact"),
    [
        ("postgres://me-myself:s3cret@h/d", "postgres:// is not a kind of database"),
        ("postgresql+nothing://me-myself:s3cret@h/d", "postgresql+nothing:// is not a kind of database"),
        ("me-myself:s3cret@h/d", "is not the URL of a database"),
        ("postgresql://me-myself:pass@h:s3cret/d", "is not the URL of a database"),
        ("postgresql://me-myself:s3 cret@h/d", "%20"),
    ],
)
def test_what_is_no_address_is_refused(url: str, fact: str) -> None:
    assert fact in refusal(url)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://me-myself:s3cret@127.0.0.1:1/studies",
        "postgresql://me-myself:s3/cret@127.0.0.1:1/studies",
        "postgresql://me-myself@127.0.0.1:1/studies?password=s3cret",
        "postgresql://me-myself:s3cret@no-such-host.invalid/studies",
        "postgresql://me-myself:s3cret@/studies?host=/nowhere",
    ],
)
def test_a_server_that_is_down_is_refused_before_any_work(url: str, tmp_path: Path) -> None:
    assert "cannot be opened (" in refusal(url)
    context = Context(load("tiny", [f"storage.root={tmp_path / 'runs'}", f"storage.optuna_url={url}"]))
    with pytest.raises(RequestError, match=r"storage\.optuna_url"):
        context.check_request()
    assert not (tmp_path / "runs").exists()


def test_a_file_is_created_later(tmp_path: Path) -> None:
    """It may lie under the storage root, which does not exist yet."""
    url = f"sqlite:///{tmp_path / 'runs/studies.db'}"
    assert is_file(url)
    Context(load("tiny", [f"storage.root={tmp_path / 'runs'}", f"storage.optuna_url={url}"])).check_request()
    assert "unable to open database file" in refusal(url)
    (tmp_path / "runs").mkdir()
    open_database(url)
    assert (tmp_path / "runs/studies.db").is_file()

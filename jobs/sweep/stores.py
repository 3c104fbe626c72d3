"""Databases that can be rebuilt from the result files: Optuna's journal and MLflow's database.

In: a `Context`. Out: a database that cannot be opened is moved to another name, so that its content is reported again;
a server or a database elsewhere is left alone.
"""

from __future__ import annotations

import sqlite3
import time
from contextlib import closing
from pathlib import Path

from jobs.context.context import Context, tracking_uri
from jobs.sweep.stage_list import STAGES

SEARCHES = ("lora", "deltas")
"""Stages with Optuna studies."""
BUSY_SECONDS = 30
"""How long SQLite waits for other writers."""


def problems(context: Context) -> dict[Path, str]:
    """The databases of this storage root that cannot be opened, and why."""
    from jobs.search.studies import journal_problem

    checks = {journal(context): journal_problem, database(context): database_problem}
    return {path: why for path, check in checks.items() if path and path.exists() and (why := check(path))}


def journal(context: Context) -> Path | None:
    """Optuna's journal; None if studies are in a database elsewhere."""
    return None if context.settings.storage.optuna_url else context.space.root / "optuna" / "journal.log"


def database(context: Context) -> Path | None:
    """MLflow's database; None if a server or a database elsewhere is used."""
    path = context.space.root / "mlflow.db"
    return path if tracking_uri(context.settings, context.space.root) == f"sqlite:///{path.resolve()}" else None


def database_problem(path: Path) -> str | None:
    """Why SQLite cannot open a database; None for a sound (or empty) one."""
    try:
        with closing(sqlite3.connect(path.resolve().as_uri() + "?mode=ro", uri=True, timeout=BUSY_SECONDS)) as store:
            (verdict,) = store.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        return None if "locked" in str(error) else f"cannot be opened ({error})"
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        return f"cannot be opened ({error})"
    return None if verdict == "ok" else "is damaged (SQLite's own check says so)"


def move_damaged(context: Context) -> None:
    """Renames databases that cannot be opened, with a message. If the journal is lost, the search stages count as not
    done, so that they rebuild their studies from the result files."""
    for path, why in problems(context).items():
        to = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}")
        path.replace(to)
        for ending in ("-wal", "-shm", "-journal"):  # SQLite's files of the old database
            path.with_name(path.name + ending).unlink(missing_ok=True)
        context.progress.line(f"  {path} {why}: moved to {to.name} and rebuilt from the result files")
        for stage in STAGES if path == journal(context) else ():
            if stage.name in SEARCHES:
                stage.drop(context)


def unreported(context: Context) -> bool:
    """Whether MLflow's database is gone, so that a finished sweep must be reported again."""
    path = database(context)
    return path is not None and not path.is_file()

"""MLflow's database file: whether SQLite can open it.

In: a path. Out: what is wrong with it.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

BUSY_SECONDS = 30


def database_problem(path: Path) -> str | None:
    """None for a sound database, an empty one among them; one that others are writing to is waited for."""
    try:
        with closing(sqlite3.connect(path.resolve().as_uri() + "?mode=ro", uri=True, timeout=BUSY_SECONDS)) as store:
            (found,) = store.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        return None if "locked" in str(error) else f"cannot be opened ({error})"
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        return f"cannot be opened ({error})"
    return None if found == "ok" else "is damaged (SQLite's own check says so)"

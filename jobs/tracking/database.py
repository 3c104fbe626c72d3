"""MLflow's database file: whether SQLite can open it.

In: a path. Out: what is wrong with it.
"""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

BUSY_SECONDS = 30


def database_problem(path: Path) -> str | None:
    """None for a sound (or empty) database. Waits for other writers."""
    try:
        with closing(sqlite3.connect(path.resolve().as_uri() + "?mode=ro", uri=True, timeout=BUSY_SECONDS)) as store:
            (verdict,) = store.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        return None if "locked" in str(error) else f"cannot be opened ({error})"
    except (sqlite3.DatabaseError, UnicodeDecodeError) as error:
        return f"cannot be opened ({error})"
    return None if verdict == "ok" else "is damaged (SQLite's own check says so)"

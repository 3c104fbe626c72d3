"""The stores that are told from result files, Optuna's journal and MLflow's database: whether they can be opened.

In: a `Context`. Out: a store that cannot be opened is put aside under another name, and the sweep counts as not told;
a server or a database elsewhere is left alone.
"""

from __future__ import annotations

import time
from pathlib import Path

from jobs.context.context import Context, tracking_uri
from jobs.sweep.stage_list import STAGES

SEARCHES = ("lora", "deltas")
"""Stages with Optuna studies."""


def problems(context: Context) -> dict[Path, str]:
    """What is wrong with each store of this storage root that cannot be opened."""
    from jobs.search.studies import journal_problem
    from jobs.tracking.database import database_problem

    checks = {journal(context): journal_problem, database(context): database_problem}
    return {path: why for path, check in checks.items() if path and path.exists() and (why := check(path))}


def journal(context: Context) -> Path | None:
    """Optuna's journal; None where studies are in a database elsewhere."""
    return None if context.settings.storage.optuna_url else context.space.root / "optuna" / "journal.log"


def database(context: Context) -> Path | None:
    """MLflow's database; None where a server is told, or a database elsewhere."""
    own = context.space.root / "mlflow.db"
    return own if tracking_uri(context.settings, context.space.root) == f"sqlite:///{own.resolve()}" else None


def put_aside(context: Context) -> None:
    """Renames stores that cannot be opened, and says so. A lost journal makes the searches open their studies again,
    from the result files."""
    for path, why in problems(context).items():
        to = path.with_name(f"{path.name}.damaged-{time.strftime('%Y%m%dT%H%M%S')}")
        path.replace(to)
        for ending in ("-wal", "-shm", "-journal"):  # SQLite's own, of the database that was there
            path.with_name(path.name + ending).unlink(missing_ok=True)
        context.progress.line(f"  {path} {why}: put aside as {to.name}, and told again from the result files")
        for stage in STAGES if path == journal(context) else ():
            if stage.name in SEARCHES:
                stage.drop(context)


def untold(context: Context) -> bool:
    """Whether MLflow's database is gone, so that a finished sweep has to be told again."""
    held = database(context)
    return held is not None and not held.is_file()

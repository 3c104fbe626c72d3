"""Sends results from disk to MLflow: after a server outage, or to another server.

In: a `Context` whose sweep has results. Out: the runs that MLflow lacks; existing runs are left alone.
"""

from __future__ import annotations

from jobs.commands.made_with import check_settings
from jobs.context.context import Context
from jobs.errors import RequestError, WorkFailed
from jobs.files import MANIFEST
from jobs.sweep.backfill import report_results
from jobs.sweep.stage_list import STAGES


def track(context: Context) -> None:
    """Raises RequestError if the sweep has no results, WorkFailed if the server stops answering."""
    space = context.space
    if not any((stage.folder(context) / MANIFEST).is_file() for stage in STAGES):
        raise RequestError(f"{space.folder} has no finished stage; run `deltascope sweep` first")
    check_settings(context, "all")  # they become the runs' parameters
    tracker = context.tracker  # only now, since making it writes files
    with space.locked():
        report_results(context)
    if tracker.lost:
        raise WorkFailed("MLflow stopped answering before everything was sent; run the same command again")
    if tracker.refused:
        raise WorkFailed(f"MLflow rejected {tracker.refused} calls, for the reason above")
    context.progress.line(f"all results of {space.name} are in MLflow")

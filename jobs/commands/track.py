"""Sends to MLflow what lies on disk: after a server was away, or for another server.

In: a `Context` whose sweep has left results. Out: the runs that are missing; those that are there stay as they are.
"""

from __future__ import annotations

from jobs.errors import RequestError, WorkFailed
from jobs.files import MANIFEST
from jobs.study.backfill import send_missing
from jobs.study.context import Context
from jobs.study.stage_list import STAGES


def track(context: Context) -> None:
    """Raises RequestError where the sweep has left nothing, WorkFailed where the server stops answering."""
    space, tracker = context.space, context.tracker
    reached = [stage for stage in STAGES if (stage.folder(context) / MANIFEST).is_file()]
    if not reached:
        raise RequestError(f"{space.folder}: no finished stage here; run `python -m jobs sweep` first")
    with space.locked():
        tracker.sweep_orphans()
        if not tracker.is_finished("sweep"):
            tracker.open("sweep", context.settings.name, params={"seed": context.settings.seed})
            tracker.close("sweep")
        for stage in reached:
            send_missing(context, stage)
        tracker.finish()
    if tracker.lost:
        raise WorkFailed("MLflow stopped answering before everything was sent; run the same command again")
    if tracker.refused:
        raise WorkFailed(f"MLflow did not take {tracker.refused} of the runs it was sent, for the reason above")
    context.progress.line(f"everything of {space.name} is in MLflow")

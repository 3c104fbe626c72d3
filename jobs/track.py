"""Sends to MLflow what lies on disk: after a server was away, or for another server.

In: a `Context` whose sweep has left results. Out: the runs that are missing; those that are there stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from jobs.context import Context
from jobs.errors import RequestError, WorkFailed
from jobs.stages.data import metrics_of
from jobs.stages.records import record_base, record_cells, record_trial
from jobs.sweep import STAGES, Stage, open_stage
from jobs.workspace import MANIFEST, read_json


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
            send(context, stage)
        tracker.finish()
    if tracker.lost:
        raise WorkFailed("MLflow stopped answering before everything was sent; run the same command again")
    if tracker.refused:
        raise WorkFailed(f"MLflow did not take {tracker.refused} of the runs it was sent, for the reason above")
    context.progress.line(f"everything of {space.name} is in MLflow")


def send(context: Context, stage: Stage) -> None:
    """What MLflow lacks of a finished stage."""
    if not context.tracker.is_finished(stage.name):
        manifest = read_json(stage.folder(context) / MANIFEST)
        known = metrics_of(manifest["report"]) if stage.name == "data" else {}
        open_stage(context, stage)
        context.tracker.close(stage.name, {**known, "seconds": manifest["seconds"]})
    if stage.name in SENT:
        SENT[stage.name](context)


def _lora(context: Context) -> None:
    for path in sorted(context.space.lora.glob("trial_*/result.json")):
        record_trial(context, "lora", "lora", read_json(path))


def _bases(context: Context) -> None:
    for path in sorted(context.space.transcoders.glob(f"layer_*/{MANIFEST}")):
        manifest = read_json(path)
        for base in manifest["bases"]:
            record_base(context, base["layer"], manifest["key"], base)


def _deltas(context: Context) -> None:
    for path in sorted(context.space.deltas.glob("layer_*/*/d*/trial_*/result.json")):
        record_trial(context, "deltas", str(path.parents[1].relative_to(context.space.deltas)), read_json(path))


def _cells(context: Context) -> None:
    record_cells(context, sorted(path.stem for path in _json_files(context.space.cells)))


def _json_files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.json") if path.name != MANIFEST]


def _report(context: Context) -> None:
    context.tracker.artifacts("sweep", context.space.report)
    context.tracker.artifacts("sweep", context.space.generations, "generations")


SENT: dict[str, Callable[[Context], None]] = {
    "lora": _lora,
    "transcoders": _bases,
    "deltas": _deltas,
    "evaluate": _cells,
    "report": _report,
}
"""What of each stage goes to MLflow beside the stage's own run."""

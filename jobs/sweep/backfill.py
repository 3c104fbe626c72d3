"""Opens each stage's run in MLflow, and sends results that are on disk but missing in MLflow.

In: a `Context` and a stage. Out: runs in MLflow; complete runs are left alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jobs.context.context import Context
from jobs.files import MANIFEST, read_json
from jobs.sweep.stage_list import STAGES, Stage
from jobs.sweep.stages.data import metrics_of
from jobs.sweep.stages.evaluate import record_cells
from jobs.sweep.stages.report import headlines
from jobs.tracking.records import record_base, record_polish, record_trial
from search_spaces.schema import Sweep


def open_stage(context: Context, stage: Stage) -> None:
    """Opens the stage's run in MLflow, with the settings that the stage reads."""
    parameters = {name: getattr(context.settings, name).model_dump(mode="json") for name in stage.parameters}
    flat = {f"{section}.{key}": value for section, values in parameters.items() for key, value in values.items()}
    context.tracker.open(stage.name, stage.name, parent="sweep", params=flat)


def report_results(context: Context) -> None:
    """Sends the results of all finished stages that MLflow lacks."""
    tracker = context.tracker
    tracker.close_orphans()
    if not tracker.is_finished("sweep"):
        tracker.open("sweep", context.settings.name, params=distinguishing_params(context.settings))
        tracker.close("sweep")
    for stage in STAGES:
        if (stage.folder(context) / MANIFEST).is_file():
            send_missing(context, stage)
    tracker.finish()


def send_missing(context: Context, stage: Stage) -> None:
    """Sends the results of a finished stage that MLflow lacks."""
    if not context.tracker.is_finished(stage.name):
        manifest = read_json(stage.folder(context) / MANIFEST)
        metrics = metrics_of(manifest["report"]) if stage.name == "data" else {}
        open_stage(context, stage)
        context.tracker.close(stage.name, {**metrics, "seconds": manifest["seconds"]})
    if stage.name in SENDERS:
        SENDERS[stage.name](context)


def _lora(context: Context) -> None:
    for path in sorted(context.space.lora.glob("trial_*/result.json")):
        record_trial(context.tracker, "lora", "lora", read_json(path))


def _bases(context: Context) -> None:
    for path in sorted(context.space.transcoders.glob(f"layer_*/{MANIFEST}")):
        manifest = read_json(path)
        for base in manifest["bases"]:
            record_base(context.tracker, base["layer"], manifest["key"], base)


def _deltas(context: Context) -> None:
    for path in sorted(context.space.deltas.glob("layer_*/*/d*/trial_*/result.json")):
        record_trial(context.tracker, "deltas", str(path.parents[1].relative_to(context.space.deltas)), read_json(path))
    for path in sorted(context.space.deltas.glob(f"polished/d*/{MANIFEST}")):
        record_polish(context.tracker, path.parent.name, read_json(path))


def _cells(context: Context) -> None:
    record_cells(context, read_json(context.space.cells / MANIFEST)["cells"])


def _report(context: Context) -> None:
    context.tracker.log("sweep", headlines(context))
    context.tracker.artifacts("sweep", context.space.report)
    context.tracker.artifacts("sweep", context.space.generations, "generations")


SENDERS: dict[str, Callable[[Context], None]] = {
    "lora": _lora,
    "transcoders": _bases,
    "deltas": _deltas,
    "evaluate": _cells,
    "report": _report,
}
"""What each stage sends to MLflow besides its own run."""


def distinguishing_params(settings: Sweep) -> dict[str, Any]:
    """Parameters of a sweep's own run in MLflow by which sweeps are compared there."""
    params: dict[str, Any] = {"seed": settings.seed, "model.source": settings.model.source}
    if settings.model.finetuned:
        params["model.finetuned"] = settings.model.finetuned
    deltas = settings.deltas
    return {**params, "deltas.targets": deltas.targets, "deltas.layers": deltas.layers, "deltas.d_new": deltas.d_new}

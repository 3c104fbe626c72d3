"""A whole study: the stages in order, what is finished already, and how it ends.

In: a `Context` and the last stage wanted. Out: results on disk and in MLflow; a raised error says what stopped it.
"""

from __future__ import annotations

import importlib
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from jobs import cluster, environment, keys
from jobs.addresses import without_secrets
from jobs.context import Context
from jobs.errors import WorkFailed
from jobs.mirror import mirrored
from jobs.progress import clock
from jobs.workspace import MANIFEST, is_finished, read_json, write_json
from search_spaces.schema import Sweep


class Stage(NamedTuple):
    """One step of a study; `module.run(context)` does it, and its manifest in `folder` holds `key`."""

    name: str
    folder: Callable[[Context], Path]
    key: Callable[[Context], str]
    parameters: tuple[str, ...] = ()

    def finished(self, context: Context) -> bool:
        return is_finished(self.folder(context), self.key(context))


STAGES = (
    Stage("data", lambda c: c.space.data, lambda c: keys.data(c.settings), ("data",)),
    Stage("lora", lambda c: c.space.lora, lambda c: keys.lora(c.settings), ("lora",)),
    Stage(
        "transcoders",
        lambda c: c.space.transcoders,
        lambda c: keys.transcoders(c.settings, c.layers),
        ("activations", "transcoders"),
    ),
    Stage("deltas", lambda c: c.space.deltas, lambda c: keys.deltas(c.settings, c.layers), ("deltas",)),
    Stage("evaluate", lambda c: c.space.cells, lambda c: keys.evaluate(c.settings, c.layers), ("evaluate",)),
    Stage("report", lambda c: c.space.report, lambda c: keys.report(c.settings, c.layers)),
)
NAMES = tuple(stage.name for stage in STAGES)


def run_sweep(context: Context, until: str = "report", fresh: bool = False) -> None:
    """Runs every stage up to `until` that is not finished.

    Raises RequestError for a request that cannot be met, WorkFailed where trials or cells failed.
    """
    space, progress = context.space, context.progress
    started = time.monotonic()
    context.check_request()
    space.create()
    with space.locked(), mirrored(context.settings.storage.mirror, space.folder, fresh, progress.line):
        progress.line(f"sweep {space.name} in {space.folder}")
        if not Path(context.settings.model.source).is_dir():
            progress.line(f"model {context.settings.model.source}")
        _ = context.model, context.layers
        stages = STAGES[: NAMES.index(until) + 1]
        if fresh or not context.space.data.is_dir():
            space.check_space(context.bytes_needed)
        if fresh:
            start_over(context)
        if all(stage.finished(context) for stage in stages):
            progress.line("everything is done already; --fresh starts over")
        else:
            context.check_bases()
            _run_stages(context, stages)
        if until == "report":
            show_results(context)
        progress.line(f"took {clock(time.monotonic() - started)}")
        if "tracker" in vars(context) and (context.tracker.lost or context.tracker.refused):
            progress.line("MLflow has not got everything: the rest lies on disk until `python -m jobs track` sends it")
    if context.failures:
        raise WorkFailed(f"{len(context.failures)} trials or cells failed:\n  " + "\n  ".join(context.failures))


def start_over(context: Context) -> None:
    """Forgets the sweep's files and studies; its MLflow runs stay, and the new ones stand beside them."""
    from jobs.studies import forget_studies

    context.space.clear()
    forget_studies(context.studies, context.settings.name)


def _run_stages(context: Context, stages: tuple[Stage, ...]) -> None:
    from jobs.track import send

    tracker = context.tracker
    write_settings(context)
    tracker.sweep_orphans()
    tracker.open("sweep", context.settings.name, params={"seed": context.settings.seed})
    status = "FAILED"
    try:
        for number, stage in enumerate(stages, start=1):
            label = f"[{number}/{len(stages)}] {stage.name}"
            if stage.finished(context):
                context.progress.line(f"{label}: done already")
                send(context, stage)  # what a kill, or a server that was away, has kept from MLflow
                continue
            context.progress.line(label)
            manifest = _run_stage(context, stage)
            if stage is stages[-1]:
                status = "FINISHED"
                tracker.close("sweep")
                tracker.finish()
            # The manifest comes last: whoever finds all of them has nothing left to do, in MLflow neither.
            write_json(stage.folder(context) / MANIFEST, manifest)
    except KeyboardInterrupt:
        environment.heard()
        status = "KILLED"
        raise
    finally:
        if status != "FINISHED":
            tracker.close("sweep", status=status)
        cluster.disconnect()
        tracker.finish()


def _run_stage(context: Context, stage: Stage) -> dict[str, Any]:
    """Returns the stage's manifest."""
    started = time.time()
    # What follows from this stage is out of date from here on, however this run ends.
    for later in STAGES[NAMES.index(stage.name) :]:
        (later.folder(context) / MANIFEST).unlink(missing_ok=True)
    open_stage(context, stage)
    status, seconds = "FAILED", 0.0
    try:
        module = importlib.import_module(f"jobs.stages.{stage.name}")
        facts: dict[str, Any] = module.run(context)
        seconds = time.time() - started
        # After a failure nothing counts as finished: the next run of the same command goes on from there.
        if not context.failures:
            workers = context.share.at_once if "share" in vars(context) else 1  # a stage without work starts no Ray
            manifest = {"key": stage.key(context), **facts, "seconds": seconds, "workers": workers}
        else:
            manifest = {"key": "incomplete", **facts, "seconds": seconds}
        status = "FINISHED"
        context.progress.line(f"  {stage.name} took {clock(seconds)}")
        return manifest
    except KeyboardInterrupt:
        environment.heard()
        status = "KILLED"
        raise
    finally:
        context.tracker.close(stage.name, {"seconds": seconds or time.time() - started}, status=status)


def open_stage(context: Context, stage: Stage) -> None:
    """The stage's run in MLflow, with the settings that the stage reads."""
    parameters = {name: getattr(context.settings, name).model_dump(mode="json") for name in stage.parameters}
    flat = {f"{section}.{key}": value for section, values in parameters.items() for key, value in values.items()}
    context.tracker.open(stage.name, stage.name, parent="sweep", params=flat)


def write_settings(context: Context) -> None:
    """`sweep.yaml` (the resolved settings, without secrets) and `versions.json` in the sweep's folder."""
    values = public_settings(context.settings)
    (context.space.folder / "sweep.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    versions = {
        "python": platform.python_version(),
        "git commit": _git_commit(),
        **{one.metadata["Name"]: one.version for one in distributions()},
    }
    write_json(context.space.folder / "versions.json", versions)


def public_settings(settings: Sweep) -> dict[str, Any]:
    """The settings as plain values, URLs without user and password."""
    values = settings.model_dump(mode="json")
    for key in ("mirror", "tracking_uri", "optuna_url"):
        if values["storage"][key]:
            values["storage"][key] = without_secrets(values["storage"][key])
    return values


def show_results(context: Context) -> None:
    """The short table at the end, the checks that failed, and where the report lies."""
    from rich.table import Table

    from evaluators.report import summary_table
    from jobs.stages.report import load_cells

    rows = summary_table(load_cells(context), seed=context.settings.seed)
    if rows:
        table = Table(
            *rows[0], title="CE minus raw CE in nats a target token, with 95% intervals", title_justify="left"
        )
        for row in rows:
            table.add_row(*row.values())
        context.progress.console.print(table)
    facts = read_json(context.space.report / MANIFEST)
    if facts:
        failed = [check for check in facts["checks"] if not check["passed"]]
        context.progress.line(f"checks: {len(facts['checks']) - len(failed)} of {len(facts['checks'])} hold")
        for check in failed:
            context.progress.line(f"  FAILS: {check['name']}: {check['detail']}")
        context.progress.line(f"report: {context.space.folder / facts['report']}")


def _git_commit() -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(cluster.REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"

"""Runs a whole sweep: the stages in order, skipping finished ones, and the summary at the end.

In: a `Context` and the last stage to run. Out: results on disk and in MLflow, or an error that says what stopped it.
"""

from __future__ import annotations

import importlib
import platform
import subprocess
import time
from collections.abc import Collection
from dataclasses import asdict
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml

from jobs.cluster import connection as cluster
from jobs.cluster import environment
from jobs.context.context import Context
from jobs.context.disk import bytes_needed
from jobs.context.workspace import PAIR, SETTINGS
from jobs.errors import RequestError, WorkFailed, without_secrets
from jobs.files import MANIFEST, read_json, seal, write_json
from jobs.progress import clock
from jobs.sweep.backfill import distinguishing_params, open_stage, report_results, send_missing
from jobs.sweep.finetuned import check_models
from jobs.sweep.mending import mend
from jobs.sweep.mirror import LEDGER, mirrored
from jobs.sweep.stage_list import NAMES, STAGES, Stage
from jobs.sweep.stores import move_damaged, unreported
from search_spaces.schema import Sweep


def run_sweep(context: Context, until: str = "report", fresh: bool = False) -> None:
    """Runs every unfinished stage up to and including `until`.

    Raises RequestError for a request that cannot be met, WorkFailed if trials or cells failed.
    """
    space, progress = context.space, context.progress
    started = time.monotonic()
    context.check_request()
    space.create()
    with space.locked(), mirrored(context.settings.storage.mirror, space.folder, fresh, progress.line):
        progress.line(f"sweep {space.name} in {space.folder}")
        if not Path(context.settings.model.source).is_dir():
            progress.line(f"model {context.settings.model.source}")
        _ = context.source, context.sites
        check_models(context)
        stages = STAGES[: NAMES.index(until) + 1]
        if fresh or not context.space.data.is_dir():
            space.check_space(bytes_needed(context), fresh)
        if fresh:
            start_over(context)
        move_damaged(context)
        mend(context, stages)
        _ = space.start  # written again if it was damaged
        if all(stage.finished(context) for stage in stages):
            if unreported(context):
                report_results(context)
            if until == "report":
                _write_yaml(context)  # perhaps with others than before, on which no result depends
            progress.line("everything is done already; --fresh starts over")
        else:
            context.check_bases()
            if context.settings.storage.optuna_url:
                _ = context.studies  # raises if it cannot be opened
            with progress.kept_in(space.folder):
                _run_stages(context, stages)
        if until == "report":
            show_results(context)
        progress.line(f"took {clock(time.monotonic() - started)}")
        if "tracker" in vars(context) and (context.tracker.lost or context.tracker.refused):
            progress.line("MLflow is missing some results; they are on disk, and `deltascope track` sends them")
    if context.failures:
        raise WorkFailed(f"{len(context.failures)} trials or cells failed:\n  " + "\n  ".join(context.failures))


def start_over(context: Context) -> None:
    """Deletes the sweep's files and studies. Its MLflow runs stay; the new ones are added next to them."""
    from jobs.search.studies import forget_studies

    context.space.clear(keep=(PAIR, LEDGER))  # just written, for a pair that was made elsewhere and by the mirror
    context.forget_pair()
    forget_studies(context.studies, context.settings.name)


def _run_stages(context: Context, stages: tuple[Stage, ...]) -> None:
    tracker = context.tracker
    tracker.close_orphans()
    tracker.open("sweep", context.settings.name, params=distinguishing_params(context.settings))
    status = "FAILED"
    try:
        unfinished = [stage.name for stage in stages if not stage.finished(context)]
        check_warm_starts(context, unfinished)
        check_workers(context, unfinished)
        first = next(number for number, stage in enumerate(STAGES) if not stage.finished(context))
        for stage in STAGES[first:]:  # what has ended is always of the settings that are written
            stage.drop(context)
        write_settings(context)
        for number, stage in enumerate(stages, start=1):
            label = f"[{number}/{len(stages)}] {stage.name}"
            if stage.finished(context):
                context.progress.line(f"{label}: done already")
                send_missing(context, stage)  # results that MLflow missed because of a kill or an outage
                continue
            context.progress.stage(label)
            manifest = _run_stage(context, stage)
            if stage is stages[-1]:
                status = "FINISHED"
                tracker.close("sweep")
                tracker.finish()
            seal(stage.folder(context), stage.files(context))
            # The manifest comes last: once all exist there is nothing left to do, not even in MLflow.
            write_json(stage.folder(context) / MANIFEST, manifest)
    except KeyboardInterrupt:
        environment.acknowledge_stop()
        status = "KILLED"
        raise
    finally:
        if status != "FINISHED":
            tracker.close("sweep", status=status)
        if not context.keeps_cluster or status != "FINISHED":
            cluster.disconnect()
        elif "pool" in vars(context):
            context.pool.close()  # its idle workers would block the next sweep's
        tracker.finish()


def _run_stage(context: Context, stage: Stage) -> dict[str, Any]:
    """Runs a stage; returns its manifest."""
    started = time.time()
    # Whatever happens, everything that depends on this stage is now out of date.
    for later in STAGES[NAMES.index(stage.name) :]:
        later.drop(context)
    open_stage(context, stage)
    status, seconds, key = "FAILED", 0.0, stage.key(context)
    try:
        module = importlib.import_module(f"jobs.sweep.stages.{stage.name}")
        facts: dict[str, Any] = module.run(context)
        seconds = time.time() - started
        check_unchanged(context, stage, key)
        # After failures the stage does not count as finished, so the same command continues it.
        if not context.failures:
            manifest = {"key": key, **facts, "seconds": seconds, "workers": 1}
            if "share" in vars(context):  # a stage with no work starts no Ray
                manifest |= {"workers": context.share.at_once, "share": asdict(context.share)}
        else:
            manifest = {"key": "incomplete", **facts, "seconds": seconds}
        status = "FINISHED"
        context.progress.line(f"  {stage.name} took {clock(seconds)}")
        return manifest
    except KeyboardInterrupt:
        environment.acknowledge_stop()
        status = "KILLED"
        raise
    finally:
        context.tracker.close(stage.name, {"seconds": seconds or time.time() - started}, status=status)


def check_unchanged(context: Context, stage: Stage, key: str) -> None:
    """Raises WorkFailed if a file that the stage reads changed since `key`, so that its results mix two models."""
    if stage.key(context) != key:
        raise WorkFailed(
            f"a model, or another file that the {stage.name} stage reads, changed while it ran; run the same command "
            "again, which redoes what depends on it"
        )


def check_warm_starts(context: Context, stages: Collection[str]) -> None:
    """Raises RequestError, before the first stage runs, if a later one should start from the best values of a sweep of
    which there are no studies."""
    from jobs.search.studies import studied_sweeps

    for name in ("lora", "deltas"):
        earlier = getattr(context.settings, name).warm_start
        if name not in stages or earlier is None or (name == "lora" and context.adopted is not None):
            continue
        if any((context.space.folder / name).glob("**/trial_*/result.json")):
            continue  # it has begun, and nothing is read any more
        known = studied_sweeps(context.studies, name)
        if not known & {earlier, context.settings.name}:
            there = ", ".join(sorted(known)) or "none"
            raise RequestError(
                f"{name}.warm_start: no sweep named {earlier!r} has Optuna studies of this stage here; those that do: "
                f"{there}"
            )


WITHOUT_RAY = {"data", "report"}
"""Stages that run in the driver alone."""


def check_workers(context: Context, stages: Collection[str]) -> None:
    """Raises RequestError, before the first stage runs, if the cluster to join cannot be used, or if the workers per
    trial of a later stage do not fit on it."""
    if context.joins_cluster and set(stages) - WITHOUT_RAY:
        _ = context.share
    for section, setting in (
        ("lora", "workers_per_trial"),
        ("transcoders", "workers_per_layer"),
        ("deltas", "workers_per_trial"),
    ):
        workers = getattr(getattr(context.settings, section), setting)
        if section in stages and workers > 1:
            context.share.of_several(workers, f"{section}.{setting}")


def write_settings(context: Context) -> None:
    """`sweep.yaml` (the resolved settings, without secrets) and `versions.json` in the sweep's folder."""
    _write_yaml(context)
    versions = {
        "python": platform.python_version(),
        "git commit": _git_commit(),
        **{package.metadata["Name"]: package.version for package in distributions()},
    }
    write_json(context.space.folder / "versions.json", versions)


def _write_yaml(context: Context) -> None:
    values = public_settings(context.settings)
    (context.space.folder / SETTINGS).write_text(yaml.safe_dump(values, sort_keys=False))


def public_settings(settings: Sweep) -> dict[str, Any]:
    """The settings as plain values, without users, passwords and queries in URLs."""
    values = settings.model_dump(mode="json")
    for key in ("mirror", "tracking_uri", "optuna_url"):
        if values["storage"][key]:
            values["storage"][key] = without_secrets(values["storage"][key])
    return values


HEADLINE = ("subset", "gap in CE", "recovered", "features for 90%", "groups for 90%")
HEADLINE_ROWS = 3
"""Number of rows of the table at the end."""


def show_results(context: Context) -> None:
    """Shows the headline in at most six lines, the failed checks, and the path of the report."""
    from rich.table import Table
    from rich.text import Text

    from evaluators.report import PAGE

    facts = read_json(context.space.report / MANIFEST)
    summary = facts.get("summary") or _summary(context)
    columns, rows = summary["columns"], summary["rows"]
    if rows:
        of_change = "recovered" in columns
        shown = [place for place, name in enumerate(columns) if name in HEADLINE or not of_change]
        table = Table(*(columns[place] for place in shown), box=None)
        for row in rows[:HEADLINE_ROWS]:
            table.add_row(*(Text(row[place]) for place in shown))
        what = "what the deltas recover" if of_change else "CE minus raw CE"
        context.progress.line(f"{what} (CE in nats per target token, 95% intervals):")
        context.progress.console.print(table)
        if len(rows) > HEADLINE_ROWS:
            context.progress.line(f"  and {len(rows) - HEADLINE_ROWS} more rows in the report")
    failed = [check for check in facts["checks"] if not check["passed"]]
    context.progress.line(f"checks: {len(facts['checks']) - len(failed)} of {len(facts['checks'])} passed")
    for check in failed:
        context.progress.line(f"  FAILED: {check['name']}: {check['detail']}")
    context.progress.line(f"report: {context.space.folder / facts['report']}")
    if (page := context.space.report / PAGE).is_file():
        context.progress.line(f"features: {page}")


def _summary(context: Context) -> dict[str, list[Any]]:
    """The table at the end, for a report made before its manifest held it."""
    from evaluators.tables.tables import all_tables
    from jobs.sweep.stages.report import summary

    return summary(all_tables(context.cells, seed=context.settings.seed))


def _git_commit() -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(cluster.REPOSITORY), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return done.stdout.strip() or "unknown"

"""The last part of stage 4: the kept change deltas of all layers, trained together, one run for each width.

In: a `Context` whose delta searches are done, with `deltas.polish_steps`. Out: `deltas/polished/dNNN/`, with a
`SITE/{delta.safetensors,config.json}` for each site and a manifest with the run's figures.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jobs.capture.activations import capture_finetuned
from jobs.capture.worker_memory import ModelSpec, bridge, paths
from jobs.context import keys
from jobs.context.context import Context
from jobs.context.disk import disk_of, drop
from jobs.errors import WorkFailed
from jobs.files import finish as finish_folder
from jobs.files import is_finished, keyed_folder, read_json, seal, sealed_hash
from sites import Address, Ground, Site


class PolishTask(NamedTuple):
    """The deltas of one width, as passed to a worker: per site, the folder of the kept delta and the mean square of its
    target; and the folder of the rows to train on."""

    model: ModelSpec
    base_model: str
    sites: tuple[Site, ...]
    deltas: tuple[str, ...]
    units: tuple[float, ...]
    rows: str
    folder: str
    key: str
    settings: dict[str, Any]
    checkpoint_seconds: float


def polish_widths(context: Context) -> dict[str, Any]:
    """The figures of joint training, by width; empty if `polish_steps` is 0."""
    from jobs.tracking.records import record_polish

    section, sites = context.settings.deltas, tuple(context.sites_of("change"))
    tasks, folders_of = [], {}
    for d_new in section.d_new if section.polish_steps else ():
        kept_folders = [context.kept_trial(Address(site, Ground("change"), d_new)) for site in sites]
        folders = [folder for folder in kept_folders if folder is not None]
        if not sites or len(folders) < len(kept_folders):
            shutil.rmtree(context.space.polished(d_new), ignore_errors=True)  # of earlier deltas
            continue  # reported by the search
        lineage = [sealed_hash(folder / "delta.safetensors") for folder in folders]
        key = keys.polished(context.settings, lineage)
        folder = keyed_folder(context.space.polished(d_new), key)
        if not is_finished(folder, key):
            tasks.append(_task(context, sites, folders, folder, key))
        folders_of[folder.name] = folder
    if tasks:
        units = _units(context, sites)
        tasks = [task._replace(units=units) for task in tasks]
        with context.progress.bar("joint polish", len(tasks), "widths") as bar:
            for outcome in context.pool.run(polish_width, tasks, context.settings.compute.max_retries):
                if outcome.error:
                    raise WorkFailed(f"joint polish, {Path(outcome.task.folder).name}: {outcome.error}")
                bar.advance()
    manifests = {name: read_json(folder / "manifest.json") for name, folder in folders_of.items()}
    for name, manifest in manifests.items():
        record_polish(context.tracker, name, manifest)
    return {name: manifest["figures"] for name, manifest in manifests.items()}


def _units(context: Context, sites: Sequence[Site]) -> tuple[float, ...]:
    """The mean square of each site's change on held-out text, which is captured again if it was deleted."""
    disk, measured = disk_of(context), {}
    for part in disk.windows(sites):
        if disk.needs_windows:
            drop(context, keep=part)
        folder = capture_finetuned(context, part, ("validation",))
        for outcome in context.pool.run(_unit, [(folder, site) for site in part]):
            if outcome.error:
                raise WorkFailed(f"the size of the change in layer {outcome.task[1].label}: {outcome.error}")
            measured[outcome.task[1]] = outcome.result
    if disk.needs_windows:
        drop(context)
    return tuple(measured[site] for site in sites)


def _unit(task: tuple[Path, Site]) -> float:
    from trainers.delta_data import change_unit

    folder, site = task
    return change_unit(folder, site)


def _task(context: Context, sites: tuple[Site, ...], deltas: list[Path], folder: Path, key: str) -> PolishTask:
    from trainers.precision import resolve_precision

    settings = context.settings
    precision = resolve_precision(settings.compute.precision, context.device)
    return PolishTask(
        model=ModelSpec(str(context.finetuned), context.device, "fp32"),
        base_model=str(context.model),
        sites=sites,
        deltas=tuple(map(str, deltas)),
        units=(),
        rows=str(context.rows),
        folder=str(folder),
        key=key,
        settings={
            "steps": settings.deltas.polish_steps,
            "lr": settings.deltas.polish_lr,
            "seed": settings.seed,
            "precision": precision,
        },
        checkpoint_seconds=settings.compute.checkpoint_seconds,
    )


def polish_width(task: PolishTask) -> None:
    """Trains one width's deltas together; after the loss of a worker, continues from the checkpoint in the folder."""
    from data.encoding import encode_row
    from data.rows import read_rows
    from models.deltas import read_delta, write_delta
    from trainers.checkpoints import Keeper
    from trainers.joint_polish import PolishSettings, Subject, polish

    started = time.perf_counter()
    model, folder = bridge(task.model.folder, task.model.device, task.model.precision), Path(task.folder)
    grounds = paths(task.model, task.base_model, task.sites)
    deltas = {site: read_delta(Path(folder)) for site, folder in zip(task.sites, task.deltas, strict=True)}
    scales = {site: unit**0.5 for site, unit in zip(task.sites, task.units, strict=True)}
    subject = Subject(model, grounds, deltas, scales)
    rows = {
        split: [encode_row(model.tokenizer, row) for row in read_rows(Path(task.rows) / f"{split}.jsonl")]
        for split in ("train", "validation")
    }
    keeper = Keeper(folder / "checkpoint.safetensors", task.checkpoint_seconds)
    polished = polish(subject, rows["train"], rows["validation"], PolishSettings(**task.settings), keeper=keeper)
    for site in task.sites:
        delta = polished.deltas[site]
        facts = {"target": "change", "d_new": delta.d_new, "polished": polished.figures}
        write_delta(delta, folder / site.folder, facts)
    keeper.forget()
    seal(folder)
    before = polished.history[0]
    figures = {**polished.figures, "val_kl_before": before["val_kl"], "val_l0_before": before["val_l0"]}
    seconds = time.perf_counter() - started
    facts = {"figures": figures, "history": polished.history, "settings": task.settings, "seconds": seconds}
    finish_folder(folder, task.key, facts)

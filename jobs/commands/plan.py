"""What a sweep would do: trials, cells, disk, bases, time.

In: a `Context`. Out: rows of text. Nothing is trained, and nothing is written except the base model's own folder.
"""

from __future__ import annotations

from pathlib import Path

from jobs.capture.bases import chosen_base
from jobs.commands.assumed import assumed_rows, memory_rows
from jobs.commands.forecast import WORKERS, schedule_rows
from jobs.commands.status import Rows, finetuned_row
from jobs.context.context import Context
from jobs.context.disk import bytes_needed, disk_of, pair_bytes, reads_of
from jobs.errors import RequestError
from jobs.evaluation.kinds import works_of
from jobs.evaluation.work import ExpectedPlanInputs
from jobs.files import MANIFEST, read_json
from jobs.progress import clock
from jobs.sweep.finetuned import check_models
from jobs.sweep.stage_list import STAGES
from sites import sites_label


def plan_rows(context: Context, measured: Path | None = None, workers: int | None = None) -> Rows:
    """The work of the whole sweep, and its time on 1, 8, 64, 512 and `workers` workers at the costs of the sweep in the
    folder `measured` (default: this sweep's own). Raises RequestError or ModelError as the sweep would."""
    context.check_request()
    check_models(context, keep=False)
    settings = context.settings
    deltas = settings.deltas
    groups = len(context.delta_groups)
    cells = sum(len(work.cells()) for work in works_of(ExpectedPlanInputs(context)))
    prompts = len(context.subsets) * settings.data.eval_rows
    rows = [
        ("model", settings.model.source),
        finetuned_row(context),
        *((f"{target} deltas", _deltas(context, target)) for target in deltas.targets),
        ("delta studies", f"{groups}, {groups * deltas.trials} trials"),
        ("evaluation", f"{cells} cells, {prompts} prompts"),
        ("disk", _disk(context)),
        *_reads(context),
        *_bases(context),
    ]
    rows += _measured(context)
    forecast = schedule_rows(context, measured or context.space.folder, workers)
    if measured and not measured.is_dir():
        raise RequestError(f"--measured: there is no folder {measured}")
    if measured and not forecast:
        raise RequestError(f"--measured: {measured} has no sweep with trials and cells of these widths")
    if settings.compute.gpus_per_trial:
        rows += memory_rows(context)
        forecast = forecast or assumed_rows(context, workers)
    return rows + (forecast or [("time on more workers", "unknown: run it once, or name a sweep with --measured")])


def _deltas(context: Context, target: str) -> str:
    sets = ", ".join(sites_label(sites) for sites in context.sets_of(target) if len(sites) > 1)
    widths = ", ".join(map(str, context.settings.deltas.d_new))
    return f"layers {sites_label(context.sites_of(target))}, d_new {widths}" + (f"; sets {sets}" if sets else "")


def _disk(context: Context) -> str:
    needed, parts = bytes_needed(context), len(disk_of(context).windows(context.sites))
    return f"{needed / 1e9:.2f} GB" + (f" at most, {parts} windows of layers one after the other" if parts > 1 else "")


def _reads(context: Context) -> Rows:
    """Bytes that delta trials read from disk, with each worker caching its last data, and bytes sent to GPUs."""
    pairs, deltas = pair_bytes(context), context.settings.deltas
    trials = len(context.delta_groups) * deltas.trials
    if not trials:
        return []
    totals = ", ".join(f"{size(reads_of(context, workers) * pairs)} by {workers}" for workers in WORKERS)
    rows = [("pairs", f"{size(pairs)} a layer and base; read from disk in all: {totals} workers")]
    if context.settings.compute.gpus_per_trial:
        fits = f"half of a GPU's memory holds {size(pairs)}"
        rows.append(("over PCIe", f"as many bytes where {fits}, else {deltas.epochs} times {size(trials * pairs)}"))
    return rows


def size(count: float) -> str:
    """`9.68e9` -> `9.68 GB`."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count / 1e6:.3g} MB"


def _bases(context: Context) -> Rows:
    """The published base selected by each percentile or the target L0; trained bases are not known in advance."""
    section = context.settings.transcoders
    if "residual" not in context.settings.deltas.targets:
        return []
    if section.source == "train":
        targets = ", ".join(f"{target:g}" for target in section.target_l0)
        return [("bases", f"trained here, width {section.width}, target L0 {targets}")]
    rows = []
    for site in context.sites_of("residual"):
        chosen = [
            f"{ground.label} {chosen_base(context, site, ground.percentile).path}"
            for ground in context.grounds_of("residual")
        ]
        rows.append((f"bases of layer {site.label}", ", ".join(chosen)))
    return rows


def _measured(context: Context) -> Rows:
    """Stage times of an earlier run with the same name."""
    manifests = {stage.name: read_json(stage.folder(context) / MANIFEST) for stage in STAGES}
    times = {name: manifest["seconds"] for name, manifest in manifests.items() if manifest and "seconds" in manifest}
    if not times:
        return []
    workers = max(manifest.get("workers", 1) for manifest in manifests.values() if manifest)
    listed = ", ".join(f"{name} {clock(seconds)}" for name, seconds in times.items())
    return [
        ("time", f"{clock(sum(times.values()))} when last run, on {workers} worker{'s' * (workers > 1)} ({listed})")
    ]

"""Stage 3, transcoders: the frozen base transcoders of every swept layer.

In: the un-finetuned model and text, or published transcoders. Out: `transcoders/layer_L/width_W/average_l0_N/` in Gemma
Scope's layout if they are trained here, and the candidate that each percentile selects.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from jobs.capture.activations import capture_base
from jobs.capture.bases import base_folder, root
from jobs.capture.worker_memory import bridge
from jobs.cluster.fanout import Pool
from jobs.context import keys
from jobs.context.context import Context
from jobs.context.disk import disk_of, drop
from jobs.context.workspace import TIMELINE
from jobs.errors import WorkFailed
from jobs.files import finish as finish_folder
from jobs.files import is_finished, keyed_folder, read_json, seal
from models.gemma_scope import Candidate, candidates, read, select, width_label, write
from models.sources import model_facts, widths_of
from models.transcoder import check_fits
from sites import Site
from trainers.settings import BaseSettings, settings_of

L0_TOLERANCE = 0.1
"""Relative deviation of a base's L0 from its target above which a line is printed."""


class LayerTask(NamedTuple):
    """The base transcoders of one site, as passed to a worker."""

    site: Site
    activations: str
    folder: str
    key: str
    settings: BaseSettings
    device: str
    precision: str
    threads: int
    workers: int
    resources: dict[str, float]
    retries: int


def run(context: Context) -> dict[str, Any]:
    if context.settings.transcoders.source == "train" and context.sites_of("residual"):
        _train(context)
    chosen: dict[str, dict[str, str]] = {}
    for site in context.sites_of("residual"):
        available = candidates(root(context), site, context.settings.transcoders.width)
        for ground in context.grounds_of("residual"):
            candidate = select(available, ground.percentile, context.settings.deltas.target_l0)
            _check(context, candidate, site)
            chosen.setdefault(site.label, {})[ground.label.removeprefix("p")] = candidate.path
    return {"source": context.settings.transcoders.source, "chosen": chosen}


def train_layer(task: LayerTask) -> dict[str, Any]:
    """Trains one site's bases side by side, here or on several workers; writes them and a manifest."""
    started = time.perf_counter()
    bridge.cache_clear()  # the capture's model is no longer needed
    if task.workers == 1:
        figures = train(task._asdict(), None)
    else:
        from jobs.search.several_workers import train_together

        figures = train_together(train, task._asdict(), task.retries)
    seal(Path(task.folder))
    finish_folder(Path(task.folder), task.key, {**figures, "seconds": time.perf_counter() - started})
    return {"layer": task.site.layer, **figures}


def train(config: dict[str, Any], report: Any) -> dict[str, Any]:
    """Trains the bases of a `LayerTask`, in one process or in each of several; the first writes the results."""
    import torch

    from trainers.activations import read_pairs
    from trainers.base_transcoder import train_bases
    from trainers.distributed import processes
    from trainers.precision import resolve_precision

    task = LayerTask(**config)
    torch.set_num_threads(task.threads)
    writes = processes(task.device).index == 0
    splits = [Path(task.activations) / split / task.site.folder for split in ("train", "validation")]
    trained = train_bases(
        read_pairs(splits[0]),
        read_pairs(splits[1]),
        replace(task.settings, precision=resolve_precision(task.precision, task.device)),
        site=task.site,
        device=task.device,
    )
    folder = Path(task.folder)
    facts: list[dict[str, Any]] = []
    for base in trained:
        name = f"average_l0_{base.facts['val_l0']:.0f}"
        if any(fact["path"].endswith(name) for fact in facts):
            name = f"average_l0_{base.facts['val_l0']:.2f}"
        path = folder / width_label(task.settings.width) / name
        if writes:
            write(base.transcoder, path, base.facts)
        facts.append({"layer": task.site.layer, "path": str(path.relative_to(folder.parent)), **base.facts})
    return {"bases": facts}


def _train(context: Context) -> None:
    from jobs.tracking.records import record_base

    settings = context.settings
    folders = {
        site: keyed_folder(base_folder(context, site), keys.base(settings, site))
        for site in context.sites_of("residual")
    }
    missing = [site for site, folder in folders.items() if not is_finished(folder, keys.base(settings, site))]
    disk = disk_of(context)
    for sites in disk.windows(missing):
        if disk.needs_windows:
            drop(context, keep=sites)
        _train_window(context, {site: folders[site] for site in sites})
    if missing and disk.needs_windows:
        drop(context)
    for site, folder in folders.items():
        for base in read_json(folder / "manifest.json")["bases"]:
            if abs(base["val_l0"] / base["target_l0"] - 1) > L0_TOLERANCE:
                context.progress.line(
                    f"  layer {site.label}: L0 is {base['val_l0']:.1f} instead of {base['target_l0']:g}, "
                    f"{base['dead_fraction']:.0%} of the features are dead (val_fvu {base['val_fvu']:.3f})"
                )
            record_base(context.tracker, site.layer, keys.base(settings, site), base)


def _train_window(context: Context, folders: dict[Site, Path]) -> None:
    """Captures these sites and trains their bases."""
    settings, section = context.settings, context.settings.transcoders
    activations = capture_base(context, list(folders))
    tasks = [
        LayerTask(
            site=site,
            activations=str(activations),
            folder=str(folder),
            key=keys.base(settings, site),
            settings=settings_of(
                BaseSettings, section, width=section.width, target_l0=section.target_l0, seed=settings.seed
            ),
            device=context.device,
            precision=settings.compute.precision,
            threads=context.share.cpus,
            workers=section.workers_per_layer,
            resources=context.share.resources,
            retries=settings.compute.max_retries,
        )
        for site, folder in folders.items()
    ]
    pool = context.pool
    if section.workers_per_layer > 1:  # they need the whole machine
        pool.close()
        share = context.share.of_several(section.workers_per_layer, "transcoders.workers_per_layer")
        pool = Pool(share, context.space.folder / TIMELINE)
    with context.progress.bar("base transcoders", len(tasks), "layers") as bar:
        for outcome in pool.run(train_layer, tasks, settings.compute.max_retries):
            if outcome.error:
                raise WorkFailed(f"base transcoders of layer {outcome.task.site.label}: {outcome.error}")
            bar.advance()
    if pool is not context.pool:
        pool.close()


def _check(context: Context, candidate: Candidate, site: Site) -> None:
    d_in, d_out = widths_of(model_facts(context.model), site)
    check_fits(
        read(root(context), candidate, site),
        site,
        d_in=d_in,
        d_out=d_out,
        origin=f"{root(context)}/{candidate.path}",
    )

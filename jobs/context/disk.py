"""How much disk a sweep needs, and the windows of sites in which its activations are captured so that they fit.

In: a `Context`. Out: bytes on disk and bytes that trials read, and lists of sites; activations that are no longer
needed are deleted here.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from evaluators.conditions import CONDITIONS
from jobs.context.context import Context
from jobs.errors import RequestError
from jobs.search.group_queue import count_reads
from models.sources import model_facts, widths_of
from sites import Site

SHARE = 0.5
"""Share of the free disk that activations may take if no budget is set."""


class Disk(NamedTuple):
    """Bytes of each site's activations and base errors, and how many bytes may be on disk at once."""

    sizes: dict[Site, int]
    budget: float

    @property
    def needs_windows(self) -> bool:
        """Whether the activations do not all fit, so that a window's are deleted before the next is captured."""
        return sum(self.sizes.values()) > self.budget

    def windows(self, sites: Sequence[Site]) -> list[list[Site]]:
        """The sites in as few parts as fit; a single one if the whole sweep fits."""
        if not self.needs_windows:
            return [sorted(sites)] if sites else []
        windows: list[list[Site]] = []
        free = 0.0
        for site in sorted(sites):
            if not windows or self.sizes[site] > free:
                windows.append([])
                free = self.budget
            windows[-1].append(site)
            free -= self.sizes[site]
        return windows


def disk_of(context: Context) -> Disk:
    """Raises RequestError if one layer exceeds the budget set. Call once per stage, because the free space changes."""
    sizes = {site: site_bytes(context, site) for site in context.sites}
    budget_gb, largest = context.settings.storage.budget_gb, max(sizes.values())
    if budget_gb is None:
        return Disk(sizes, _bytes_stored(context) + SHARE * _free(context))
    if largest > budget_gb * 1e9:
        raise RequestError(
            f"storage.budget_gb: got {budget_gb:g}, must be at least {largest / 1e9:.2g}, "
            "the size of the largest layer's activations"
        )
    return Disk(sizes, budget_gb * 1e9)


def site_bytes(context: Context, site: Site) -> int:
    """Bytes captured at a site, including base errors: bf16; per token, d_in values of x and d_out of other columns.
    The un-finetuned model is captured on held-out text only, unless bases are trained on it."""
    settings = context.settings
    section, (d_in, d_out) = settings.activations, widths_of(model_facts(context.model), site)
    tokens, changed = section.train_tokens + section.validation_tokens, site in context.sites_of("change")
    stored = changed and not context.is_linear(site)
    values = (
        tokens * (d_in + stored * d_out) + 2 * (changed and not stored) * d_in * d_out
    )  # x, and the change or a map
    if site in context.sites_of("residual"):
        values += (tokens + section.validation_tokens * (not changed)) * d_out  # y, and the change of held-out text
        values += tokens * len(settings.deltas.selections) * keeps_base_errors(context) * d_out
        unfinetuned = tokens if settings.transcoders.source == "train" else section.validation_tokens
        values += unfinetuned * (d_in + d_out)
    return 2 * values


def keeps_base_errors(context: Context) -> bool:
    """Whether base errors are stored. On a GPU, recomputing them should be cheaper than reading."""
    setting = context.settings.storage.base_errors
    return setting == "kept" if setting != "auto" else not on_gpu(context)


def on_gpu(context: Context) -> bool:
    """Whether trials have a GPU; by the settings, if no cluster is known yet."""
    gpus = context.settings.compute.gpus_per_trial
    return context.device != "cpu" if gpus is None and "share" in vars(context) else bool(gpus)


def pair_bytes(context: Context) -> int:
    """Bytes that a trial reads at the widest site: x and, unless the change is linear, the target."""
    section, facts = context.settings.activations, model_facts(context.model)
    widths = {site: widths_of(facts, site) for site in context.sites}
    widest = max((d_in + d_out * (not context.is_linear(site)) for site, (d_in, d_out) in widths.items()), default=0)
    return 2 * (section.train_tokens + section.validation_tokens) * widest


def reads_of(context: Context, workers: int) -> int:
    """Number of times that pairs are read from disk if each of `workers` caches what its last trial read."""
    groups = {group.name: f"{group.site.folder}/{group.ground.label}" for group in context.delta_groups}
    return count_reads(dict.fromkeys(groups, context.settings.deltas.trials), groups, workers)


def drop(context: Context, keep: Sequence[Site] = ()) -> None:
    """Deletes the activations and base errors of all sites except `keep`."""
    kept_folders = {site.folder for site in keep}
    for folder in _shard_folders(context):
        if not kept_folders & set(folder.relative_to(context.space.folder).parts):
            context.checked.discard(folder)
            shutil.rmtree(folder)


def bytes_needed(context: Context) -> int:
    """Disk space for a whole sweep, without small files: the largest window of activations and base errors, moments,
    adapters and the merged model."""
    settings, disk = context.settings, disk_of(context)
    facts = model_facts(context.model)
    most = max(sum(disk.sizes[site] for site in window) for window in disk.windows(context.sites))
    weights = sum(path.stat().st_size for path in context.model.glob("*.safetensors"))
    residual, bases = context.sites_of("residual"), 0
    if residual and settings.transcoders.source == "train" and isinstance(settings.transcoders.width, int):
        features = len(settings.transcoders.target_l0) * settings.transcoders.width
        bases = sum(features * sum(widths_of(facts, site)) * 4 for site in residual)
    moments = 0
    if any(CONDITIONS[name].ranked for name in settings.evaluate.controls):
        grounds = {(group.site, group.ground) for group in context.delta_groups}
        for d_in, d_out in (widths_of(facts, site) for site, _ in grounds):
            moments += (d_in**2 + d_in * d_out + d_out**2) * 8
    return most + 2 * weights + bases + moments


def _shard_folders(context: Context) -> list[Path]:
    space = context.space
    paths = [*space.activations.glob("*/*/layer_*"), *space.deltas.glob("layer_*/*/residual/*")]
    return sorted(path for path in paths if path.is_dir())


def _bytes_stored(context: Context) -> int:
    """Bytes of activations and base errors on disk; a running sweep may delete some meanwhile."""
    total = 0
    for folder in _shard_folders(context):
        with contextlib.suppress(FileNotFoundError):
            total += sum(path.stat().st_size for path in folder.iterdir())
    return total


def _free(context: Context) -> int:
    root = next(path for path in (context.space.folder, *context.space.folder.parents) if path.is_dir())
    return shutil.disk_usage(root).free

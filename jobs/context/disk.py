"""How much disk a sweep takes, and the windows of sites that its activations are made in so that they fit.

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
"""Of the free disk, which activations may take where no budget is set."""


class Disk(NamedTuple):
    """Bytes that each site's activations and base errors take, and how many may be there at once."""

    sizes: dict[Site, int]
    budget: float

    @property
    def apart(self) -> bool:
        """Whether they do not fit at once, so that each window's are deleted before the next one's are made."""
        return sum(self.sizes.values()) > self.budget

    def windows(self, sites: Sequence[Site]) -> list[list[Site]]:
        """The sites in as few parts as fit; a single one where those of the whole sweep do."""
        if not self.apart:
            return [sorted(sites)] if sites else []
        found: list[list[Site]] = []
        left = 0.0
        for site in sorted(sites):
            if not found or self.sizes[site] > left:
                found.append([])
                left = self.budget
            found[-1].append(site)
            left -= self.sizes[site]
        return found


def disk_of(context: Context) -> Disk:
    """Raises RequestError where one layer exceeds a budget that is set. Ask once in a stage: what is free changes."""
    sizes = {site: site_bytes(context, site) for site in context.sites}
    budget_gb, largest = context.settings.storage.budget_gb, max(sizes.values())
    if budget_gb is None:
        return Disk(sizes, _there(context) + SHARE * _free(context))
    if largest > budget_gb * 1e9:
        raise RequestError(
            f"storage.budget_gb: got {budget_gb:g}, must be at least {largest / 1e9:.2g}, "
            "which the activations of one layer take"
        )
    return Disk(sizes, budget_gb * 1e9)


def site_bytes(context: Context, site: Site) -> int:
    """Bytes of what is captured at a site, base errors included: bf16, d_in values a token of x, d_out of the others.
    Of the un-finetuned model it is held-out text alone, unless bases are trained on it."""
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
    """Whether what bases leave is kept on disk. On a GPU, multiplying again should be cheaper than reading."""
    asked = context.settings.storage.base_errors
    return asked == "kept" if asked != "auto" else not on_gpu(context)


def on_gpu(context: Context) -> bool:
    """Whether trials have a GPU, or would have one by the settings where no cluster is known yet."""
    gpus = context.settings.compute.gpus_per_trial
    return context.device != "cpu" if gpus is None and "share" in vars(context) else bool(gpus)


def pair_bytes(context: Context) -> int:
    """Bytes that the trials of one site and ground read: x, and what is explained or what that follows from; of the
    widest site."""
    section, facts = context.settings.activations, model_facts(context.model)
    widths = {site: widths_of(facts, site) for site in context.sites}
    widest = max((d_in + d_out * (not context.is_linear(site)) for site, (d_in, d_out) in widths.items()), default=0)
    return 2 * (section.train_tokens + section.validation_tokens) * widest


def reads_of(context: Context, workers: int) -> int:
    """Number of times that pairs are read from disk if each of `workers` caches what its last trial read."""
    groups = {one.name: f"{one.site.folder}/{one.ground.label}" for one in context.delta_groups}
    return count_reads(dict.fromkeys(groups, context.settings.deltas.trials), groups, workers)


def drop(context: Context, keep: Sequence[Site] = ()) -> None:
    """Deletes the activations and base errors of all sites but these."""
    kept = {site.folder for site in keep}
    for folder in _held(context):
        if not kept & set(folder.relative_to(context.space.folder).parts):
            context.checked.discard(folder)
            shutil.rmtree(folder)


def bytes_needed(context: Context) -> int:
    """Disk space for a whole sweep, small files aside: activations and base errors, as many as are there at once,
    moments, adapters and the merged model."""
    settings, disk = context.settings, disk_of(context)
    facts = model_facts(context.model)
    most = max(sum(disk.sizes[site] for site in window) for window in disk.windows(context.sites))
    weights = sum(path.stat().st_size for path in context.model.glob("*.safetensors"))
    residual, bases = context.sites_of("residual"), 0
    if residual and settings.transcoders.source == "train" and isinstance(settings.transcoders.width, int):
        each = len(settings.transcoders.target_l0) * settings.transcoders.width
        bases = sum(each * sum(widths_of(facts, site)) * 4 for site in residual)
    moments = 0
    if any(CONDITIONS[name].ranked for name in settings.evaluate.controls):
        grounds = {(group.site, group.ground) for group in context.delta_groups}
        for d_in, d_out in (widths_of(facts, site) for site, _ in grounds):
            moments += (d_in**2 + d_in * d_out + d_out**2) * 8
    return most + 2 * weights + bases + moments


def _held(context: Context) -> list[Path]:
    """Folders of shards."""
    space = context.space
    found = [*space.activations.glob("*/*/layer_*"), *space.deltas.glob("layer_*/*/residual/*")]
    return sorted(path for path in found if path.is_dir())


def _there(context: Context) -> int:
    """Bytes of activations and base errors on disk; a sweep that runs may delete some meanwhile."""
    found = 0
    for folder in _held(context):
        with contextlib.suppress(FileNotFoundError):
            found += sum(path.stat().st_size for path in folder.iterdir())
    return found


def _free(context: Context) -> int:
    root = next(path for path in (context.space.folder, *context.space.folder.parents) if path.is_dir())
    return shutil.disk_usage(root).free

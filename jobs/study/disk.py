"""How much disk a sweep takes, and the windows of layers that its activations are made in so that they fit.

In: a `Context`. Out: bytes on disk and bytes that trials read, and lists of layers; activations that are no longer
needed are deleted here.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from jobs.errors import RequestError
from jobs.search.turns import count_reads
from jobs.study.context import Context
from models.sources import model_facts

SHARE = 0.5
"""Of the free disk, which activations may take where no budget is set."""


def layer_bytes(context: Context, layer: int) -> int:
    """Of everything captured of a layer, and of its base errors: bf16, d_model values a token and tensor. Of the
    un-finetuned model, held-out text alone unless bases are trained on it."""
    settings = context.settings
    section, d_model = settings.activations, model_facts(context.model)["d_model"]
    tokens = section.train_tokens + section.validation_tokens
    values = tokens * (1 + (layer in context.layers_of("change")))  # x, and the change
    if layer in context.layers_of("residual"):
        values += tokens * (1 + len(settings.deltas.selections))  # y, and what each base leaves
        values += 2 * (tokens if settings.transcoders.source == "train" else section.validation_tokens)
    return 2 * values * d_model


def activation_bytes(context: Context) -> int:
    """Of all layers."""
    return sum(layer_bytes(context, layer) for layer in context.layers)


def windows(context: Context, layers: Sequence[int] | None = None) -> list[list[int]]:
    """The layers, all unless they are given, in as few parts as fit `storage.budget_gb` one after the other; a single
    part where those of the whole sweep fit at once. Raises RequestError where one layer exceeds a budget that is set.
    """
    asked = context.layers if layers is None else sorted(layers)
    sizes = {layer: layer_bytes(context, layer) for layer in context.layers}
    budget = budget_bytes(context)
    if sum(sizes.values()) <= budget:
        return [asked] if asked else []
    largest = max(sizes.values())
    if context.settings.storage.budget_gb is not None and largest > budget:
        raise RequestError(
            f"storage.budget_gb: got {budget / 1e9:g}, must be at least {largest / 1e9:.2g}, "
            "which the activations of one layer take"
        )
    found: list[list[int]] = []
    left = 0.0
    for layer in asked:
        if not found or sizes[layer] > left:
            found.append([])
            left = budget
        found[-1].append(layer)
        left -= sizes[layer]
    return found


def pair_bytes(context: Context) -> int:
    """Of what the trials of a layer and ground read: x and what is explained there."""
    section = context.settings.activations
    return 2 * 2 * (section.train_tokens + section.validation_tokens) * model_facts(context.model)["d_model"]


def reads_of(context: Context, workers: int) -> int:
    """How often so many workers, each of which keeps what its last trial read, read the pairs of a layer and ground."""
    groups = {one.name: f"{one.layer}/{one.ground.label}" for one in context.delta_groups}
    return count_reads(dict.fromkeys(groups, context.settings.deltas.trials), groups, workers)


def budget_bytes(context: Context) -> float:
    """What activations may take at once: as set, or a share of what is free without those that are there."""
    if context.settings.storage.budget_gb is not None:
        return context.settings.storage.budget_gb * 1e9
    there = sum(path.stat().st_size for folder in _held(context, context.layers) for path in folder.iterdir())
    root = next(path for path in (context.space.folder, *context.space.folder.parents) if path.is_dir())
    return SHARE * (shutil.disk_usage(root).free + there)


def in_windows(context: Context) -> bool:
    """Whether activations are deleted as soon as their window of layers is done."""
    return len(windows(context)) > 1


def drop(context: Context, layers: Sequence[int]) -> None:
    """Deletes the activations and base errors of these layers."""
    for folder in _held(context, layers):
        context.checked.discard(folder)
        shutil.rmtree(folder)


def _held(context: Context, layers: Sequence[int]) -> list[Path]:
    """Folders of shards."""
    space = context.space
    patterns = {
        space.activations: [f"*/*/layer_{layer:02d}" for layer in layers],
        space.deltas: [f"layer_{layer:02d}/*/residual/*" for layer in layers],
    }
    found = [path for folder, names in patterns.items() for name in names for path in sorted(folder.glob(name))]
    return [path for path in found if path.is_dir()]


def bytes_needed(context: Context) -> int:
    """Disk space for a whole sweep, small files aside: activations and base errors, as many as are there at once,
    adapters and the merged model."""
    settings = context.settings
    most = max(sum(layer_bytes(context, layer) for layer in window) for window in windows(context))
    weights = sum(path.stat().st_size for path in context.model.glob("*.safetensors"))
    residual, bases = context.layers_of("residual"), 0
    if residual and settings.transcoders.source == "train" and isinstance(settings.transcoders.width, int):
        each = len(settings.transcoders.target_l0) * settings.transcoders.width
        bases = len(residual) * each * model_facts(context.model)["d_model"] * 8
    return most + 2 * weights + bases

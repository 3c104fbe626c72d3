"""What each result on disk depends on, as a short hash.

In: settings. Out: keys. Settings that give the same result give the same key; each key includes the keys it builds on,
so a changed setting changes the keys of exactly what depends on it.
"""

from __future__ import annotations

from pathlib import Path

from jobs.files import key_of
from search_spaces.schema import Sweep
from search_spaces.sections import Section


def _dump(section: Section, *leave_out: str) -> dict:
    return section.model_dump(mode="json", exclude=set(leave_out))


def data(settings: Sweep) -> str:
    # A user's rows are checked against the model's context length, so they depend on the model too.
    model = settings.model.source if settings.data.rows_file or settings.data.text_train_file else None
    files = (settings.data.rows_file, settings.data.text_train_file, settings.data.text_validation_file)
    return key_of("data", settings.seed, _dump(settings.data), model, [_stamp(path) for path in files if path])


def _stamp(path: str) -> list[int]:
    """Size and modification time of a user's file, so that an edited file is read again."""
    try:
        stat = Path(path).stat()
    except FileNotFoundError:
        return []
    return [stat.st_size, stat.st_mtime_ns]


def lora_group(settings: Sweep) -> str:
    """The key of a single LoRA trial: the number of trials is not part of it."""
    return key_of(
        "lora",
        data(settings),
        settings.seed,
        _dump(settings.model),
        _dump(settings.lora, "trials"),
        settings.compute.precision,
    )


def lora(settings: Sweep) -> str:
    return key_of(lora_group(settings), settings.lora.trials)


def base_activations(settings: Sweep) -> str:
    return key_of(
        "activations",
        settings.transcoders.convention,
        data(settings),
        settings.seed,
        _dump(settings.model),
        _dump(settings.activations),
        settings.compute.precision,
    )


def base(settings: Sweep, layer: int) -> str:
    """The key of a layer's base transcoders."""
    section = settings.transcoders
    if section.source != "train":
        return key_of("published", section.source, section.width, layer, section.convention)
    return key_of("base", base_activations(settings), _dump(section, "layers"), layer)


def transcoders(settings: Sweep, layers: list[int]) -> str:
    return key_of([base(settings, layer) for layer in layers], settings.deltas.selections, settings.deltas.target_l0)


def finetuned_activations(settings: Sweep) -> str:
    return key_of("finetuned", lora(settings), base_activations(settings))


def residual(settings: Sweep, layer: int, percentile: float | None) -> str:
    which = settings.deltas.target_l0 if percentile is None else percentile
    return key_of("residual", finetuned_activations(settings), base(settings, layer), which)


def delta_group(settings: Sweep, layer: int, percentile: float | None, d_new: int) -> str:
    return key_of(
        "delta",
        residual(settings, layer, percentile),
        d_new,
        settings.seed,
        _dump(settings.deltas, "percentiles", "target_l0", "d_new", "trials"),
        settings.compute.precision,
    )


def deltas(settings: Sweep, layers: list[int]) -> str:
    section = settings.deltas
    groups = [
        delta_group(settings, layer, percentile, d_new)
        for layer in layers
        for percentile in section.selections
        for d_new in section.d_new
    ]
    return key_of(groups, section.trials)


def evaluate(settings: Sweep, layers: list[int]) -> str:
    return key_of("evaluate", deltas(settings, layers), _dump(settings.evaluate))


def report(settings: Sweep, layers: list[int]) -> str:
    return key_of("report", evaluate(settings, layers), settings.name)

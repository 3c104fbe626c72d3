"""Were a sweep's results made with the settings at hand?

In: a `Context`. Out: nothing, or a RequestError that names the first setting that differs. Settings that only choose
among results, such as `deltas.d_new`, or say where and how fast things run, may differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import yaml

from data.rows import one_line
from jobs.context import keys
from jobs.context.context import Context
from jobs.context.workspace import SETTINGS
from jobs.errors import RequestError
from jobs.files import MANIFEST, is_for
from sites import Address

Results = Literal["rows", "model", "deltas", "all"]
"""What depends on the settings: each of these on more of them than the one before."""
SECTIONS: dict[Results, tuple[str, ...]] = {
    "rows": ("seed", "model", "data"),
    "model": ("seed", "model", "data", "lora", "compute"),
    "deltas": ("seed", "model", "data", "lora", "compute", "activations", "transcoders", "deltas"),
    "all": ("seed", "model", "data", "lora", "compute", "activations", "transcoders", "deltas", "evaluate"),
}
CHOOSES = {
    "model": ("dtype",),
    "lora": ("trials", *keys.EXECUTION),
    "transcoders": ("layers", *keys.EXECUTION),
    "deltas": (*keys.GROUPED_BY, *keys.EXECUTION),
}
"""By section, settings that do not change the deltas that exist."""
PATHS = (
    *("model.source", "model.finetuned", "transcoders.source", "data.rows_file", "data.evaluation_file"),
    *("data.text_train_file", "data.text_validation_file"),
)
"""Settings that may be paths, which lead to other places on another machine."""


def check_settings(context: Context, of: Results = "deltas") -> None:
    """Raises RequestError if a sweep with these settings would make others than those on disk."""
    for key, made, now in differing(context, of):
        raise RequestError(
            f"{key}: got {now!r}, but the results of the sweep {context.settings.name} were made with {made!r}; run "
            "`sweep` with the new settings first, or use the old ones"
        )


def check_model(context: Context) -> None:
    """Raises RequestError if the finetuned model on disk is of other settings."""
    check_settings(context, "model")
    settings = context.settings
    key = keys.lora(settings) if settings.model.finetuned else keys.lora_group(settings)
    _check_finished(context, context.space.lora, context.space.lora, key, "finetuned model")


def check_deltas(context: Context, groups: Iterable[Address]) -> None:
    """Raises RequestError if the deltas of these groups are of other settings."""
    check_settings(context)
    for group in groups:
        key = keys.delta_group(context.settings, group)
        _check_finished(context, context.space.deltas, context.space.deltas / group.folder, key, "deltas")


def _check_finished(context: Context, stage: Path, folder: Path, key: str, what: str) -> None:
    # A stage that has ended was made with the settings in `sweep.yaml`; one that was stopped may hold older results.
    if not (stage / MANIFEST).is_file() and folder.is_dir() and not is_for(folder, key):
        raise RequestError(
            f"the {what} of the sweep {context.settings.name} in {folder} may be of earlier settings; run `sweep` again"
        )


def differing(context: Context, of: Results) -> Iterator[tuple[str, Any, Any]]:
    """(key, its value when the sweep last ran, its value now) of settings that decide about results. Settings that an
    earlier version did not have are left out."""
    path = context.space.folder / SETTINGS
    if not path.is_file():
        return
    try:
        made = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(f"{path} cannot be read as YAML ({one_line(error)}); run `sweep` again") from None
    now = yaml.safe_load(yaml.safe_dump(context.settings.model_dump(mode="json")))
    for section in SECTIONS[of]:
        before, values = made.get(section) if isinstance(made, dict) else None, now[section]
        if not isinstance(values, dict):
            if before not in (None, values):
                yield section, before, values
        elif isinstance(before, dict):
            for name, value in values.items():
                if name in before and _decides(context, section, name, of):
                    yield from _unequal(f"{section}.{name}", before[name], value)


def _decides(context: Context, section: str, name: str, of: Results) -> bool:
    settings, bases = context.settings, context.settings.transcoders
    if section == "compute":
        return name == "precision"
    if section == "lora" and settings.model.finetuned:
        return False
    if section == "transcoders" and "residual" not in settings.deltas.targets:
        return False
    if section == "transcoders" and bases.source != "train" and name not in ("source", "width", "convention"):
        return False
    if section == "deltas" and name in keys.POLISH and not settings.deltas.polish_steps:
        return name == "polish_steps"
    return name not in (keys.EXECUTION if of == "all" else CHOOSES.get(section, ()))


def _unequal(key: str, made: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if key == "model.dtype" and made == "auto":
        made = "fp32"  # what earlier settings called it
    if key in PATHS and made and now and _moved(made, now):
        return
    if isinstance(made, dict) and isinstance(now, dict):
        for name in [*now, *(name for name in made if name not in now)]:
            yield from _unequal(f"{key}.{name}", made.get(name), now.get(name))
    elif made != now:
        yield key, made, now


def _moved(made: str, now: str) -> bool:
    """Whether a path leads to the same file as before, or to one of that name where the other is no longer there."""
    here, there = Path(now), Path(made)
    if not here.exists():
        return False
    return there.samefile(here) if there.exists() else there.name == here.name

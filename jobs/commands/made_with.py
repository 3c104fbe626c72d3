"""Were a sweep's results made with the settings at hand?

In: a `Context`. Out: nothing, or a RequestError that names the first setting that differs. Settings that only choose
among results, such as `deltas.d_new`, or say where and how fast things run, may differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from data.rows import one_line
from jobs.context import keys
from jobs.context.context import Context
from jobs.context.workspace import SETTINGS
from jobs.errors import RequestError
from jobs.files import MANIFEST, is_for

CHOOSES = {
    "model": ("dtype",),
    "lora": ("trials", *keys.EXECUTION),
    "transcoders": ("layers", *keys.EXECUTION),
    "deltas": (*keys.GROUPED_BY, *keys.EXECUTION),
}
"""By section, settings that do not change the deltas that exist."""


def check_settings(context: Context, evaluated: bool = False) -> None:
    """Raises RequestError if a sweep with these settings would make other deltas, or (`evaluated`) other results, than
    those on disk."""
    for key, made, now in differing(context, evaluated):
        raise RequestError(
            f"{key}: got {now!r}, but what the sweep {context.settings.name} has on disk was made with {made!r}; run "
            "`sweep` with these settings first, or give those of the sweep"
        )


def check_model(context: Context) -> None:
    """Raises RequestError if the finetuned model on disk is of other settings."""
    check_settings(context)
    settings = context.settings
    key = keys.lora(settings) if settings.model.finetuned else keys.lora_group(settings)
    _check_finished(context, context.space.lora, context.space.lora, key, "finetuned model")


def check_deltas(context: Context, folder: Path, key: str) -> None:
    """Raises RequestError if the deltas in a group's folder are of other settings."""
    check_settings(context)
    _check_finished(context, context.space.deltas, folder, key, "deltas")


def _check_finished(context: Context, stage: Path, folder: Path, key: str, what: str) -> None:
    # A stage that has ended was made with the settings in `sweep.yaml`; one that was stopped may hold older results.
    if not (stage / MANIFEST).is_file() and folder.is_dir() and not is_for(folder, key):
        raise RequestError(
            f"the {what} of the sweep {context.settings.name} in {folder} may be of earlier settings; run `sweep` again"
        )


def differing(context: Context, evaluated: bool = False) -> Iterator[tuple[str, Any, Any]]:
    """(key, its value when the sweep last ran, its value now) of settings that decide about deltas or, if `evaluated`,
    about any result. Settings that an earlier version did not have are left out."""
    path = context.space.folder / SETTINGS
    if not path.is_file():
        return
    try:
        made = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RequestError(f"{path} cannot be read as YAML ({one_line(error)}); run `sweep` again") from None
    now = yaml.safe_load(yaml.safe_dump(context.settings.model_dump(mode="json")))
    for section, values in now.items():
        before = made.get(section) if isinstance(made, dict) else None
        if not isinstance(values, dict):
            if section == "seed" and before not in (None, values):
                yield section, before, values
        elif isinstance(before, dict):
            for name, value in values.items():
                if name in before and _decides(context, section, name, evaluated):
                    yield from _unequal(f"{section}.{name}", before[name], value)


def _decides(context: Context, section: str, name: str, evaluated: bool) -> bool:
    settings = context.settings
    if section in ("storage", "compute"):
        return name == "precision"
    if section == "lora" and settings.model.finetuned:
        return False
    if section == "transcoders" and "residual" not in settings.deltas.targets:
        return False
    if evaluated:
        return name not in keys.EXECUTION
    return section != "evaluate" and name not in CHOOSES.get(section, ())


def _unequal(key: str, made: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    if key.startswith("data.") and key.endswith("_file") and made and now:
        made, now = Path(made).name, Path(now).name  # a user's file may have been moved
    if isinstance(made, dict) and isinstance(now, dict):
        for name in [*now, *(name for name in made if name not in now)]:
            yield from _unequal(f"{key}.{name}", made.get(name), now.get(name))
    elif made != now:
        yield key, made, now

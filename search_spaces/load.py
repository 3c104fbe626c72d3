"""Reads a sweep's settings: a YAML file, then `key.sub=value` overrides.

In: a path and override strings. Out: a `Sweep`, or a `SettingsError` of one sentence naming the key, what was given
and what is allowed.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from search_spaces.schema import Sweep

PRESETS = Path(__file__).parent


class SettingsError(ValueError):
    """A request that the settings do not allow."""


def load(config: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Sweep:
    """Reads `config` (a path, or the name of a preset) and applies `overrides` in order."""
    values = _read(config)
    for override in overrides:
        _apply(values, override)
    try:
        return Sweep.model_validate(values)
    except ValidationError as error:
        raise SettingsError(_sentence(error)) from None


def presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def _read(config: str | Path) -> dict[str, Any]:
    path = Path(config)
    if not path.is_file() and str(config) in presets():
        path = PRESETS / f"{config}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            f"no settings file {config}; give a YAML file or one of the presets: {', '.join(presets())}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"{path} must hold settings as `key: value` lines, found {type(values).__name__}")
    return values


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key.strip():
        raise SettingsError(f"{override!r} is not an override; write key.sub=value, such as lora.trials=8")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SettingsError(f"{key}: the value {text!r} cannot be read; quote it, or write a list as [a, b]") from None
    if isinstance(value, str) and _EXPONENT.fullmatch(value):
        value = float(value)  # YAML 1.1 reads 1e-3 as text; a user who writes it means the number.
    node = values
    *parents, last = key.strip().split(".")
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise SettingsError(f"{key}: {part} holds the value {child!r} and has no keys inside")
        node = child
    node[last] = value


def _sentence(error: ValidationError) -> str:
    """The first problem of a validation error as one sentence."""
    problem = error.errors(include_url=False)[0]
    place = [part for part in problem["loc"] if not _is_union_tag(part)]
    key = ".".join(str(part) for part in place) or "the settings"
    given = problem.get("input")
    if problem["type"] == "extra_forbidden":
        allowed = _keys_at(place[:-1])
        near = difflib.get_close_matches(str(place[-1]), allowed, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{key}: unknown key{hint}; allowed here: {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"{key}: missing; it must be given"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = message if problem["type"] == "value_error" else f"must be {message}"
    if not place:
        return message
    return f"{key}: got {json.dumps(given, default=str)}, {message}"


def _is_union_tag(part: int | str) -> bool:
    return isinstance(part, str) and (
        part in _UNION_TAGS or part.startswith(("list[", "literal[", "constrained-", "function-"))
    )


_EXPONENT = re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+")
_UNION_TAGS = {"Range", "Choice", "bool", "int", "float", "str"}


def _keys_at(place: list[int | str]) -> list[str]:
    section: type[BaseModel] = Sweep
    for part in place:
        field = section.model_fields.get(str(part))
        if field is None:
            return []
        kinds = [field.annotation, *get_args(field.annotation)]
        inner = [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
        if not inner:
            return []
        section = inner[0]
    return sorted(section.model_fields)

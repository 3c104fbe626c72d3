"""Reads a sweep's settings: a YAML file, then `key.sub=value` overrides.

In: a path and override strings. Out: a `Sweep`, or a `SettingsError`: one sentence with the key, what was given and
what is allowed.
"""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from search_spaces.dimensions import TAGS
from search_spaces.schema import Sweep

PRESETS = Path(__file__).parent
DEEPEST = 8
"""Levels of a settings file; the presets have four."""


class SettingsError(ValueError):
    """The settings are invalid; the message is one sentence."""


def load(config: str | Path | None, overrides: list[str] | tuple[str, ...] = ()) -> Sweep:
    """Reads `config` (a path, or the name of a preset) and applies `overrides` in order; without a file, the overrides
    and the defaults are all there is."""
    values = {"name": "look"} if config is None else _read(config)
    for override in overrides:
        _apply(values, override)
    try:
        return Sweep.model_validate(values)
    except ValidationError as error:
        raise SettingsError(_sentence(error)) from None


def presets() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


class _Loader(yaml.SafeLoader):
    """YAML with fewer surprises: 1e-3 is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key, _ in node.value:
            if key.value in keys:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            keys.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _read(config: str | Path) -> dict[str, Any]:
    path = Path(config)
    if not path.is_file() and str(config) in presets():
        path = PRESETS / f"{config}.yaml"
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    except FileNotFoundError:
        raise SettingsError(
            f"there is no settings file {config}; give a YAML file or one of the presets: {', '.join(presets())}"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read: {error}") from None
    except (yaml.YAMLError, TypeError) as error:
        raise SettingsError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise SettingsError(f"{path} nests too deep; settings are {DEEPEST} levels deep at most") from None
    except ValueError:
        raise SettingsError(f"{str(config)!r} is not a path: it holds a NUL character") from None
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise SettingsError(f"{path} must have settings as `key: value` lines, found {type(values).__name__}")
    _check_plain(values, f"{path}: ")
    return values


def _check_plain(value: Any, place: str, above: tuple[int, ...] = (), checked: set[int] | None = None) -> None:
    """Rejects values that nest too deep or contain themselves, and text with a NUL, as text may become a path."""
    checked = set() if checked is None else checked
    if isinstance(value, str) and "\0" in value:
        raise SettingsError(f"{place}: got {_shown(value)}, must be text without a NUL character")
    if not isinstance(value, dict | list) or id(value) in checked:
        return
    if id(value) in above:
        raise SettingsError(f"{place} refers to itself")
    if len(above) == DEEPEST:
        raise SettingsError(f"{place} nests too deep; settings are {DEEPEST} levels deep at most")
    for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
        _check_plain(inner, f"{place}{'' if place.endswith(' ') else '.'}{name}", (*above, id(value)), checked)
    checked.add(id(value))  # a YAML alias is the same object again


def _apply(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not all(part.strip() for part in key.split(".")):
        raise SettingsError(f"{override!r} is not an override; write key.sub=value, such as lora.trials=8")
    try:
        value = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError):
        raise SettingsError(f"{key}: the value {text!r} cannot be read; quote it, or write a list as [a, b]") from None
    _check_plain(value, key)
    node = values
    *parents, last = key.strip().split(".")
    for part in parents:
        child = node.setdefault(part, {})
        if not isinstance(child, dict):
            raise SettingsError(f"{key}: {part} is the value {child!r} and has no keys inside")
        node = child
    node[last] = value


def _sentence(error: ValidationError) -> str:
    """The first problem in a validation error, as one sentence."""
    problems = error.errors(include_url=False)
    first = _place(problems[0])
    # A setting of a union type has one problem per alternative, at its own key or inside it.
    same_key = [candidate for candidate in problems if _place(candidate)[: len(first)] == first]
    place = max(map(_place, same_key), key=len)
    problem, *further = [candidate for candidate in same_key if _place(candidate) == place]
    key = ".".join(map(str, place)) or "the settings"
    if problem["type"] == "extra_forbidden":
        allowed = sorted(_section(problem["loc"][:-1]).model_fields)
        near = difflib.get_close_matches(str(place[-1]), allowed, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{key}: unknown key{hint}; allowed here: {', '.join(allowed)}"
    if problem["type"] == "missing":
        return f"{key} is missing; it must be given"
    if problem["type"] == "value_error":
        message = problem["msg"].removeprefix("Value error, ")
        return message if not place else f"{key}: got {_shown(problem['input'])}, {message}"
    allowed_kinds = dict.fromkeys(map(_allowed, (problem, *further)))
    return f"{key}: got {_shown(problem['input'])}, must be {' or '.join(allowed_kinds)}"


def _place(problem: Any) -> list[int | str]:
    """The keys and list indices of a problem's location, without pydantic's names for the members of a union."""
    location = list(problem["loc"])
    unknown_key = location.pop() if problem["type"] == "extra_forbidden" else None  # keep it, even if it is `int`
    parts = [part for part in location if isinstance(part, int) or not _KIND.match(part)]
    return parts if unknown_key is None else [*parts, unknown_key]


_KIND = re.compile(r"(range|choice|value|bool|int|float|str|constrained-\w+)$|(list|literal|function-\w+)\[")


def _allowed(problem: Any) -> str:
    """What a setting must be, in words; pydantic's own words if `_WORDS` has none."""
    limits = problem.get("ctx", {})
    return _WORDS.get(problem["type"], problem["msg"].removeprefix("Input should be ")).format(**limits)


_WORDS = {
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "model_type": "settings of its own, as key: value",
    "dict_type": "settings of its own, as key: value",
    "too_short": "a list of at least {min_length}",
    "string_pattern_mismatch": "text of the form {pattern}",
    "literal_error": "{expected}",
}


def _shown(value: Any) -> str:
    shown = json.dumps(value, default=str, ensure_ascii=False)
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _section(location: tuple[int | str, ...]) -> type[BaseModel]:
    """The settings class at a problem's location."""
    section: type[BaseModel] = Sweep
    for part in location:
        if part in TAGS:
            section = TAGS[str(part)] or section
        elif str(part) in section.model_fields:
            kind = section.model_fields[str(part)].annotation
            section = kind if isinstance(kind, type) and issubclass(kind, BaseModel) else section
    return section

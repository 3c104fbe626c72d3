"""Behaviours: checks of a generated text, each of which becomes a rate in every table.

In: `evaluate.behaviours`, names of checks with their options. Out: for each answer True or False, or None if the check
does not apply. To add a kind of check, write one function here: its name is the kind's name, its argument the option,
and it returns the function that judges an answer.
"""

from __future__ import annotations

import importlib
import json as json_format
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import re2

from data.rows import DataError
from evaluators.measures import calculator as calls


class Answer(NamedTuple):
    """A generated text, its input, and its target; `tokens` is its length, including EOS."""

    input: str
    target: str
    label: str
    text: str
    tokens: int


Check = Callable[[Answer], bool | None]
AGREES = "agrees_with_raw"
"""Always checked: is the text the finetuned model's own?"""
TAKEN = (AGREES, "tokens", "examples", "replicas")
"""Names that the tables already use for columns: the rate itself, or `n_NAME`."""
KINDS: dict[str, Callable[[Any], Check]] = {}


REMARKS: dict[str, Callable[[str], str | None]] = {"calculator": calls.value}
"""By kind of check, a function that comments on a text, shown in a chat; most kinds have none."""


class Behaviour(NamedTuple):
    """A check of some kind, and the subsets that it applies to (None: all)."""

    kind: str
    check: Check
    on: frozenset[str] | None = None

    @property
    def counts_tokens(self) -> bool:
        return self.kind == at_most_tokens.__name__

    def __call__(self, answer: Answer) -> bool | None:
        return self.check(answer) if self.on is None or answer.label in self.on else None


class BadOption(ValueError):
    """An option that a check cannot use; the message says what it takes."""


def kind(make: Callable[[Any], Check]) -> Callable[[Any], Check]:
    KINDS[make.__name__] = make
    return make


@kind
def equals_target(option: None) -> Check:
    """The text is the target, character by character."""
    _nothing(option)
    return lambda answer: answer.text == answer.target


@kind
def contains(option: str) -> Check:
    phrase = _text(option)
    return lambda answer: phrase in answer.text


@kind
def starts_with(option: str) -> Check:
    phrase = _text(option)
    return lambda answer: answer.text.startswith(phrase)


@kind
def ends_with(option: str) -> Check:
    phrase = _text(option)
    return lambda answer: answer.text.endswith(phrase)


@kind
def matches(option: str) -> Check:
    """A regular expression in RE2's syntax is found in the text; matching takes linear time, whatever the pattern."""
    try:
        pattern = re2.compile(_text(option))
    except re2.error as error:
        reason = error.args[0].decode() if isinstance(error.args[0], bytes) else error
        raise BadOption(f"{option!r} is not a regular expression that RE2 reads ({reason})") from None
    return lambda answer: pattern.search(answer.text) is not None


@kind
def json(option: None) -> Check:
    """The whole text is one JSON value."""
    _nothing(option)

    def check(answer: Answer) -> bool:
        try:
            json_format.loads(answer.text)
        except (ValueError, RecursionError):
            return False
        return True

    return check


@kind
def at_most_tokens(option: int) -> Check:
    if not isinstance(option, int) or isinstance(option, bool) or option < 1:
        raise BadOption(f"takes a whole number, 1 or larger, got {option!r}")
    return lambda answer: answer.tokens <= option


@kind
def calculator(option: str | None) -> Check:
    """A tool call: there is one (`called`, the default), its tag is closed (`closed`), or its expression has the
    target's value (`correct`, if the target has one)."""
    parts: dict[str, Check] = {
        "called": lambda answer: calls.called(answer.text),
        "closed": lambda answer: calls.closed(answer.text),
        "correct": lambda answer: calls.correct(answer.target, answer.text),
    }
    if option is not None and option not in parts:
        raise BadOption(f"takes {', '.join(parts)} or nothing, got {option!r}")
    return parts[option or "called"]


@kind
def python(option: str) -> Check:
    """The user's own `module:function`, called with (input, target, generation)."""
    module, _, name = _text(option).partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except Exception as error:  # the module is the user's: anything may happen while it is imported
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise BadOption(f"cannot import {option!r} ({reason}); it takes MODULE:FUNCTION") from None
    if not callable(function):
        raise BadOption(f"{option!r} is not a function; it takes MODULE:FUNCTION")

    def check(answer: Answer) -> bool | None:
        try:
            verdict = function(answer.input, answer.target, answer.text)
            return None if verdict is None else bool(verdict)
        except Exception as error:  # as above
            raise DataError(
                f"evaluate.behaviours: {option} failed on {answer.input[:60]!r} ({type(error).__name__}: {error})"
            ) from None

    return check


def read_behaviours(entries: Mapping[str, Any]) -> dict[str, Behaviour]:
    """The behaviours by name. Raises DataError, which names the behaviour, for an unknown kind or a wrong option."""
    for name in entries:
        if name in TAKEN or name.startswith("delta_"):
            raise DataError(f"evaluate.behaviours.{name}: the tables already use this name; choose another")
    return {name: _read(name, entry) for name, entry in entries.items()}


def subsets_of(entry: Any) -> Any:
    """The subsets to which a behaviour's entry in the settings restricts it; None for all."""
    return entry.get("on") if isinstance(entry, dict) else None


def remarks(behaviours: Mapping[str, Behaviour], text: str) -> list[str]:
    """The comments of the behaviours' kinds on a text."""
    kinds = dict.fromkeys(behaviour.kind for behaviour in behaviours.values())
    comments = (REMARKS[kind](text) for kind in kinds if kind in REMARKS)
    return [comment for comment in comments if comment is not None]


def _read(name: str, entry: Any) -> Behaviour:
    key = f"evaluate.behaviours.{name}"
    options, on = {entry: None} if isinstance(entry, str) else dict(entry), subsets_of(entry)
    options.pop("on", None)
    if len(options) != 1:
        raise DataError(f"{key}: names {len(options)} checks, must name one of {', '.join(KINDS)}")
    ((kind, option),) = options.items()
    if kind not in KINDS:
        raise DataError(f"{key}: there is no check {kind!r}; allowed: {', '.join(KINDS)}")
    if on is not None and not (isinstance(on, list) and on and all(isinstance(subset, str) for subset in on)):
        raise DataError(f"{key}: on takes a list of subsets, got {on!r}")
    try:
        return Behaviour(kind, KINDS[kind](option), None if on is None else frozenset(on))
    except BadOption as error:
        raise DataError(f"{key}: {kind} {error}") from None


def _text(option: Any) -> str:
    if not isinstance(option, str) or not option:
        raise BadOption(f"takes text, got {option!r}")
    return option


def _nothing(option: Any) -> None:
    if option not in (None, True):
        raise BadOption(f"takes no option, got {option!r}")

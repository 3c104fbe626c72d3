"""Behaviours: checks of a generated text, each of which becomes a rate in every table.

In: `evaluate.behaviours`, names of checks with their options. Out: for an answer True, False, or None where the
question does not arise. To add a kind of check, write one function here: its name is the kind's name, what it takes is
the option, and what it returns judges an answer.
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
    """A generated text, what it answers, and what it should have been; `tokens` is its length, EOS included."""

    input: str
    target: str
    label: str
    text: str
    tokens: int


Check = Callable[[Answer], bool | None]
AGREES = "agrees_with_raw"
"""Always asked: is the text the finetuned model's own?"""
TAKEN = (AGREES, "tokens", "examples", "replicas")
"""Names whose columns the tables have already: the rate itself, or `n_NAME`."""
KINDS: dict[str, Callable[[Any], Check]] = {}


REMARKS: dict[str, Callable[[str], str | None]] = {"calculator": calls.value}
"""What a kind of check can say about a text beyond yes and no, shown in a chat; most have nothing to add."""


class Behaviour(NamedTuple):
    """A check of some kind, and the subsets that it is asked of (None: all)."""

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
    wanted = _text(option)
    return lambda answer: wanted in answer.text


@kind
def starts_with(option: str) -> Check:
    wanted = _text(option)
    return lambda answer: answer.text.startswith(wanted)


@kind
def ends_with(option: str) -> Check:
    wanted = _text(option)
    return lambda answer: answer.text.endswith(wanted)


@kind
def matches(option: str) -> Check:
    """A regular expression in RE2's syntax is found in the text; matching takes linear time, whatever the pattern."""
    try:
        pattern = re2.compile(_text(option))
    except re2.error as error:
        said = error.args[0].decode() if isinstance(error.args[0], bytes) else error
        raise BadOption(f"{option!r} is not a regular expression that RE2 reads ({said})") from None
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
        raise BadOption(f"takes a whole number from 1 on, got {option!r}")
    return lambda answer: answer.tokens <= option


@kind
def calculator(option: str | None) -> Check:
    """A tool call: that there is one (`called`, the default), that its tag is closed (`closed`), or that its expression
    has the target's value (`correct`, asked where the target has one)."""
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
        said = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise BadOption(f"cannot import {option!r} ({said}); it takes MODULE:FUNCTION") from None
    if not callable(function):
        raise BadOption(f"{option!r} is no function; it takes MODULE:FUNCTION")

    def check(answer: Answer) -> bool | None:
        try:
            said = function(answer.input, answer.target, answer.text)
            return None if said is None else bool(said)
        except Exception as error:  # as above
            raise DataError(
                f"evaluate.behaviours: {option} failed on {answer.input[:60]!r} ({type(error).__name__}: {error})"
            ) from None

    return check


def read_behaviours(asked: Mapping[str, Any]) -> dict[str, Behaviour]:
    """The behaviours by name. Raises DataError, which names the behaviour, for an unknown kind or a wrong option."""
    for name in asked:
        if name in TAKEN or name.startswith("delta_"):
            raise DataError(f"evaluate.behaviours.{name}: the tables already use this name; choose another")
    return {name: _read(name, one) for name, one in asked.items()}


def subsets_of(asked: Any) -> Any:
    """The subsets that a behaviour is asked of, as the settings say it; None for all."""
    return asked.get("on") if isinstance(asked, dict) else None


def remarks(behaviours: Mapping[str, Behaviour], text: str) -> list[str]:
    """What the behaviours' kinds have to say about a text."""
    said = (REMARKS[kind](text) for kind in dict.fromkeys(one.kind for one in behaviours.values()) if kind in REMARKS)
    return [one for one in said if one is not None]


def _read(name: str, asked: Any) -> Behaviour:
    key = f"evaluate.behaviours.{name}"
    options, on = {asked: None} if isinstance(asked, str) else dict(asked), subsets_of(asked)
    options.pop("on", None)
    if len(options) != 1:
        raise DataError(f"{key}: names {len(options)} checks, must name one of {', '.join(KINDS)}")
    ((which, option),) = options.items()
    if which not in KINDS:
        raise DataError(f"{key}: there is no check {which!r}; allowed: {', '.join(KINDS)}")
    if on is not None and not (isinstance(on, list) and on and all(isinstance(one, str) for one in on)):
        raise DataError(f"{key}: on takes a list of subsets, got {on!r}")
    try:
        return Behaviour(which, KINDS[which](option), None if on is None else frozenset(on))
    except BadOption as error:
        raise DataError(f"{key}: {which} {error}") from None


def _text(option: Any) -> str:
    if not isinstance(option, str) or not option:
        raise BadOption(f"takes text, got {option!r}")
    return option


def _nothing(option: Any) -> None:
    if option not in (None, True):
        raise BadOption(f"takes no option, got {option!r}")

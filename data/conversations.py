"""Conversations as files hold them: lists of messages, checked and cleaned for a chat template.

In: a value from a record. Out: message dictionaries with every key that they had, and their text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Message = dict[str, Any]
"""`role`, `content`, and whatever else a template may read, such as `tool_calls`."""


class Reject(Exception):
    """Why a row cannot be used: a short reason to count it under, and a detail about this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def messages_of(given: Any) -> list[Message]:
    """The messages of a record. Keys without a value are dropped: Parquet files fill them in.

    Raises Reject where it is not a list of messages with a role and text.
    """
    given = from_json(given, "messages")
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
        raise Reject("messages are not a list of {role, content}")
    messages = [without_none(one) for one in given]
    for message in messages:
        text(message.get("role"), "role")
        if "content" in message or not message.get("tool_calls"):
            more = message.get("tool_calls") or message.get("reasoning_content")
            may_be_empty = bool(more) or message["role"] not in ("user", "assistant")
            _check_content(message.get("content"), may_be_empty)
    for one in strings_in(messages):
        _check_unicode(one, "messages")
    return messages


def from_json(given: Any, name: str) -> Any:
    """A value, parsed if it is text: in a cell of a CSV file, and often elsewhere, lists are written as JSON."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except (ValueError, RecursionError) as error:
        raise Reject(f"{name} are not JSON", str(error)) from None


def without_none(value: Any) -> Any:
    """The value without keys that have no value, at every depth."""
    if isinstance(value, Mapping):
        return {key: without_none(one) for key, one in value.items() if one is not None}
    if isinstance(value, list | tuple):
        return [without_none(one) for one in value]
    return value


def holds_none(value: Any) -> bool:
    """Whether a key has no value, at any depth."""
    if isinstance(value, Mapping):
        return any(one is None or holds_none(one) for one in value.values())
    return isinstance(value, list | tuple) and any(map(holds_none, value))


def text_of(message: Message) -> str:
    """What a message says, without its tool calls."""
    content = message.get("content")
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def strings_in(value: Any) -> Iterator[str]:
    """All text in a value, at every depth, names of keys too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, one in value.items():
            yield str(key)
            yield from strings_in(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from strings_in(one)


def text(value: Any, name: str) -> str:
    """The value if it is text; raises Reject if it is not, or is blank."""
    if not isinstance(value, str):
        raise Reject(f"{name} is not text", type(value).__name__)
    if not value.strip():
        raise Reject(f"{name} is empty")
    _check_unicode(value, name)
    return value


def _check_unicode(value: str, name: str) -> None:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise Reject("not UTF-8", f"unpaired surrogate in {name}") from None


def _check_content(content: Any, may_be_empty: bool) -> None:
    if isinstance(content, list):
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type", "text") != "text"
                or not isinstance(part.get("text"), str)
            ):
                kind = part.get("type") if isinstance(part, dict) else type(part).__name__
                raise Reject("a message has a part that is not text", str(kind))
        content = "".join(part["text"] for part in content)
    if not (may_be_empty and content == ""):
        text(content, "content")

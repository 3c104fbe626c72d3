"""Reads conversations from records: lists of messages, checked and cleaned for a chat template.

In: a value from a record. Out: message dictionaries with all their keys, and their text.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Message = dict[str, Any]
"""`role`, `content`, and whatever else a template may read, such as `tool_calls`."""
REASONING = frozenset({"reasoning_content", "reasoning", "thinking"})
"""Names of what a model thought before it answered; transformers gives a template all of them."""


class Reject(Exception):
    """Why a row cannot be used: a short reason, by which rejected rows are counted, and a detail of this row."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


def messages_of(value: Any) -> list[Message]:
    """The messages of a record. Keys whose value is None are dropped, because Parquet files add them.

    Raises Reject if `value` is not a list of messages that have a role and text.
    """
    value = from_json(value, "messages")
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise Reject("messages are not a list of {role, content}")
    messages = [without_none(message) for message in value]
    for message in messages:
        text(message.get("role"), "role")
        if "content" in message or not message.get("tool_calls"):
            other_text = message.get("tool_calls") or any(message.get(name) for name in REASONING)
            may_be_empty = bool(other_text) or message["role"] not in ("user", "assistant")
            _check_content(message.get("content"), may_be_empty)
    for string in strings_in(messages):
        check_unicode(string, "messages")
    return messages


def from_json(value: Any, name: str) -> Any:
    """Parses a value that is text: CSV files, and often others, hold lists as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise Reject(f"{name} are not JSON", str(error)) from None


def without_none(value: Any) -> Any:
    """The value without keys whose value is None, at every depth."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_none(item) for item in value]
    return value


def holds_none(value: Any) -> bool:
    """Whether any key, at any depth, has the value None."""
    if isinstance(value, Mapping):
        return any(item is None or holds_none(item) for item in value.values())
    return isinstance(value, list | tuple) and any(map(holds_none, value))


def text_of(message: Message) -> str:
    """The text of a message, without its tool calls."""
    content = message.get("content")
    return "".join(part["text"] for part in content) if isinstance(content, list) else content or ""


def strings_in(value: Any) -> Iterator[str]:
    """All strings in a value, at every depth, including the names of keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield str(key)
            yield from strings_in(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_in(item)


def text(value: Any, name: str) -> str:
    """Returns the value; raises Reject if it is not text, or is blank."""
    if not isinstance(value, str):
        raise Reject(f"{name} is not text", type(value).__name__)
    if not value.strip():
        raise Reject(f"{name} is empty")
    check_unicode(value, name)
    return value


def check_unicode(value: str, name: str) -> None:
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

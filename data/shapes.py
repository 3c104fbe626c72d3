"""Files in the shapes that other tools write: Alpaca, ShareGPT, and prompt with completion.

In: a record. Out: how records like it become `input`, `messages` and `target`, or, for common shapes that are not
supported, one sentence about the setting that maps them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from data.conversations import Message, Reject, from_json, text
from data.rows import DataError

Record = Mapping[str, Any]

ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}
"""ShareGPT's names of speakers, and the roles of chat templates."""
_MAPPED = (
    ("question", "answer"),
    ("query", "response"),
    ("question", "response"),
    ("prompt", "response"),
    ("instruction", "response"),
    ("prompt", "answer"),
    ("prompt", "target"),
    ("input", "output"),
)
"""Columns of prompts and answers that no shape claims: too many tools use them differently."""


ANSWERS = ("output", "target", "response", "answer", "completion")
"""Columns that may hold the answer of a row with an instruction; the first that is there is read."""
_SHARE_GPT = "read as ShareGPT: each message is {from, value}, human is the user and gpt the assistant"


class Shape(NamedTuple):
    """A known shape: a sentence that says how it is read, the columns it uses, and what turns a record into ours."""

    note: str
    columns: tuple[str, ...]
    convert: Callable[[Record], dict[str, Any]]


def shape_of(record: Record, path: str, columns: Mapping[str, str]) -> Shape | None:
    """The shape of a file by its first record; None if it has the columns that the settings name, or ours.

    Raises DataError for a common shape that is not read, naming the setting that maps its columns.
    """
    messages = columns.get("messages", "messages")
    if "input" not in columns and _has_speakers(record.get(messages)):
        return Shape(_SHARE_GPT, (messages, "system"), partial(_share_gpt, column=messages))
    if {"input", "messages", "target"} & set(columns):
        return None
    is_row = "target" in record and "output" in record
    if "instruction" in record and "messages" not in record and not is_row and {"input", "output"} & set(record):
        answer = next((name for name in ANSWERS if name in record), None)
        note = "read as Alpaca: the instruction, a line break and the input, where there is one, are the input"
        note += f"; the {answer} is the target" if answer else ""
        names = ("instruction", "input", *([answer] if answer else []))
        return Shape(note, names, partial(_alpaca, answer=answer))
    if "messages" in record or ("input" in record and ("target" in record or "output" not in record)):
        return None
    if "conversations" in record:
        return Shape(_SHARE_GPT, ("conversations", "system"), _share_gpt)
    if {"prompt", "completion"} <= set(record):
        note = "read as prompt and completion: the prompt is the input, the completion the target; in the plain format "
        note += "data.separator stands between them"
        return Shape(note, ("prompt", "completion"), _completion)
    _refuse(record, path)
    return None


def _alpaca(record: Record, answer: str | None) -> dict[str, Any]:
    instruction, more = record.get("instruction"), record.get("input")
    if isinstance(instruction, str) and isinstance(more, str) and more.strip():
        instruction = f"{instruction}\n{more}"
    return {"input": instruction, "target": record.get(answer) if answer else None}


def _has_speakers(turns: Any) -> bool:
    first = turns[0] if isinstance(turns, list) and turns else None
    return isinstance(first, dict) and "from" in first and "role" not in first


def _share_gpt(record: Record, column: str = "conversations") -> dict[str, Any]:
    turns = from_json(record.get(column), "conversations")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise Reject("conversations are not a list of {from, value}")
    messages = [_turn(turn) for turn in turns]
    if isinstance(system := record.get("system"), str) and system.strip() and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return {"messages": messages}


def _turn(turn: Record) -> Message:
    if "role" in turn and "from" not in turn:
        return dict(turn)
    speaker = text(turn.get("from"), "from")
    if speaker not in ROLES:
        raise Reject("conversations have an unknown speaker", speaker)
    content = text(turn.get("value"), "value")
    extra = {name: value for name, value in turn.items() if name not in ("from", "value")}
    if speaker != "function_call":
        return {**extra, "role": ROLES[speaker], "content": content}
    calls = from_json(content, "function calls")
    functions = calls if isinstance(calls, list) else [calls]
    return {**extra, "role": "assistant", "tool_calls": [{"type": "function", "function": call} for call in functions]}


def _completion(record: Record) -> dict[str, Any]:
    prompt, completion = record.get("prompt"), record.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return {"messages": [*prompt, *completion]}
    if isinstance(prompt, list):
        return {"messages": prompt, "target": completion}
    return {"input": prompt, "target": completion}


def _refuse(record: Record, path: str) -> None:
    names = set(record)
    if {"chosen", "rejected"} <= names:
        lists = isinstance(record["chosen"], list)
        if lists and "prompt" not in names:
            advice = "data.columns={messages: chosen} reads the chosen conversations"
        elif "prompt" in names and not lists:
            advice = "data.columns={input: prompt, target: chosen} reads the chosen answers"
        elif lists:
            advice = "write each prompt with its chosen answer as one list of messages to read these"
        else:
            advice = "split each chosen text into an input and a target to read these"
        raise DataError(f"{path} has preferences, chosen and rejected; {advice}")
    for first, second in _MAPPED:
        if {first, second} <= names:
            raise DataError(
                f"{path} has the columns {first} and {second}; data.columns={{input: {first}, target: {second}}} reads "
                "them as prompts and answers"
            )
    if "text" in names:
        raise DataError(
            f"{path} has no column input or messages, but text, which does not say where the answer begins: give rows "
            "an input and a target, or data.columns={input: text} for prompts without answers"
        )

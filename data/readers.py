"""A user's own files, streamed; rows that cannot be used are counted, and the first ones are quoted.

In: rows as JSON lines, CSV, Parquet or a dataset of the hub, or a text file with one text per line. Out: iterators of
rows or texts, and a `Log` of what was rejected and why.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data.chat import Chat, Message
from data.rows import DataError, Row, make_row
from data.sources import MAX_LINE_BYTES, Unreadable, raw_lines, records

COLUMNS = ("input", "target", "label", "messages")
UNLABELLED = "all"
"""The subset of rows without a label."""
MAX_LABEL_CHARACTERS = 64
NAMED_REJECTS = 10


class _Reject(Exception):
    """Why a row cannot be used: a short reason to count it under, and a detail about this one."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows are read: the file's names for our columns, the chat template (None: plain text), what is wrong with a
    row for the model (None: nothing), and whether a row may lack its target."""

    columns: Mapping[Any, str] = field(default_factory=dict)
    chat: Chat | None = None
    problem: Callable[[Row], str | None] = lambda row: None
    targets_needed: bool = True


@dataclass
class Log:
    """What happened to a file's rows. `first` lists up to ten rejected ones as `line 7: not JSON (...)`."""

    path: str
    unit: str = "line"
    lines: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    @property
    def rejected(self) -> int:
        return self.reasons.total()

    def reject(self, why: _Reject) -> None:
        self.reasons[why.reason] += 1
        if len(self.first) < NAMED_REJECTS:
            self.first.append(f"{self.unit} {self.lines}: {why.reason}{f' ({why.detail})' if why.detail else ''}")

    def require(self, max_reject_fraction: float) -> None:
        """Raises `DataError` if more than that fraction of the rows was rejected, or if there were none."""
        if not self.lines:
            raise DataError(f"{self.path} is empty")
        if self.rejected > max_reject_fraction * self.lines:
            raise DataError(
                f"{self.path}: {self.rejected} of {self.lines} {self.unit}s cannot be used, more than the allowed "
                f"fraction of {max_reject_fraction:g}; the first: {'; '.join(self.first)}"
            )

    def as_dict(self) -> dict[str, Any]:
        """For the report: path, lines, rejected, reasons, first."""
        return {
            "path": self.path,
            "lines": self.lines,
            "rejected": self.rejected,
            "reasons": dict(sorted(self.reasons.items())),
            "first": self.first,
        }


def stream_rows(log: Log, reading: Reading) -> Iterator[Row]:
    """Rows of `log.path` (see `data.sources.records`), in file order; rejected ones are noted in `log`.

    A row has `input` or `messages`, a list of {role, content}; and a `target`, or an assistant's message at the end. A
    label is any text or number. A row without a label is in the subset `all`.

    Raises `DataError` where the first row lacks a column that `reading` names.
    """
    log.unit, found = records(log.path)
    for record in found:
        log.lines += 1
        try:
            if isinstance(record, Unreadable):
                raise _Reject(record.reason, record.detail)
            if log.lines == 1:
                _check_columns(log.path, record, reading.columns)
            row = _row(record, reading)
            if (problem := reading.problem(row)) is not None:
                raise _Reject(problem)
        except _Reject as reject:
            log.reject(reject)
        else:
            yield row


def stream_texts(log: Log, problem: Callable[[Row], str | None] = lambda row: None) -> Iterator[str]:
    """Texts of the file `log.path`, one per line, in file order; rejected lines are noted in `log`.

    Only a newline ends a line; a carriage return or Unicode line separator inside a line becomes a space, so that every
    later reader sees a text as one line.
    """
    for raw in raw_lines(log.path):
        log.lines += 1
        try:
            if len(raw) > MAX_LINE_BYTES:
                raise _Reject("line longer than 1 MiB")
            try:
                text = " ".join(raw.decode("utf-8").splitlines()).strip()
            except UnicodeDecodeError as error:
                raise _Reject("not UTF-8", f"byte {error.start + 1}") from None
            if not text:
                raise _Reject("empty")
            if (wrong := problem(Row(text, "", ""))) is not None:
                raise _Reject(wrong)
        except _Reject as reject:
            log.reject(reject)
        else:
            yield text


def _check_columns(path: str, record: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    for ours, theirs in columns.items():
        if theirs not in record:
            raise DataError(f"data.columns.{ours}: {path} has no column {theirs!r}; it has {', '.join(record)}")


def _row(record: Mapping[str, Any], reading: Reading) -> Row:
    given = {ours: record.get(reading.columns.get(ours, ours)) for ours in COLUMNS}
    if "input" in reading.columns and "messages" not in reading.columns:
        given["messages"] = None
    if given["messages"] is not None:
        if reading.chat is None:
            raise _Reject("messages need data.format chat")
        messages = _messages(given["messages"])
        if given["target"] is None and messages[-1].role == "assistant":
            *messages, last = messages
            given["target"] = last.content
    elif given["input"] is None:
        raise _Reject("no input", f"it has {', '.join(record)}")
    else:
        messages = [Message("user", _text(given["input"], "input"))]
    if not messages:
        raise _Reject("messages hold an answer and no question")
    target = "" if given["target"] is None else _text(given["target"], "target")
    if not target and reading.targets_needed:
        raise _Reject("no target")
    text = "\n".join(message.content for message in messages)
    if reading.chat is None:
        return make_row(text, target, _label(given["label"]))
    try:
        prompt = reading.chat.prompt(messages)
    except DataError as error:
        raise _Reject(str(error)) from None
    return make_row(text, target, _label(given["label"]), prompt, reading.chat.end)


def _messages(given: Any) -> list[Message]:
    if isinstance(given, str):  # a cell of a CSV file
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise _Reject("messages are not JSON", str(error)) from None
    if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
        raise _Reject("messages are not a list of {role, content}")
    return [Message(_text(one.get("role"), "role"), _text(one.get("content"), "content")) for one in given]


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _Reject(f"{name} is not text", type(value).__name__)
    if not value.strip():
        raise _Reject(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Reject("not UTF-8", f"unpaired surrogate in {name}") from None
    return value


def _label(value: Any) -> str:
    if value is None or value == "":
        return UNLABELLED
    if isinstance(value, bool | float | list | dict):
        raise _Reject("label is neither text nor a whole number", type(value).__name__)
    label = " ".join(_text(str(value), "label").split())
    if len(label) > MAX_LABEL_CHARACTERS:
        raise _Reject(f"label longer than {MAX_LABEL_CHARACTERS} characters")
    return label

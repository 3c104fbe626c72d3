"""A user's own files, streamed line by line; unusable lines are counted, and the first ones are quoted.

In: a JSON-lines file of `{input, target, label}` or a text file with one text per line. Out: iterators of rows or
texts, and a `LineLog` of what was rejected and why.
"""

from __future__ import annotations

import codecs
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from data.rows import CALL_OPEN, LABELS, DataError, Row, make_row

LABEL_NAMES = {"positive": "tool", "negative": "copy"} | {label: label for label in LABELS}
MAX_LINE_BYTES = 1 << 20
NAMED_REJECTS = 10

T = TypeVar("T")


class _Reject(Exception):
    """Why a line cannot be used: a short reason to count it under, and a detail about this line."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason, self.detail = reason, detail


@dataclass
class LineLog:
    """What happened to a file's lines. `first` lists up to ten rejected lines as `line 7: not JSON (...)`."""

    path: str
    lines: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)

    @property
    def rejected(self) -> int:
        return self.reasons.total()

    def require(self, max_reject_fraction: float) -> None:
        """Raises `DataError` if more than that fraction of the lines was rejected, or if there were no lines."""
        if not self.lines:
            raise DataError(f"{self.path} is empty")
        if self.rejected > max_reject_fraction * self.lines:
            raise DataError(
                f"{self.path}: {self.rejected} of {self.lines} lines cannot be used, more than the allowed "
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


def stream_rows(log: LineLog, fits: Callable[[str], bool]) -> Iterator[Row]:
    """Rows of the JSON-lines file `log.path`, in file order; rejected lines are noted in `log`.

    A label may be tool, copy, tool_ood, positive (tool) or negative (copy); without a label, a target that contains
    `<tool_call>` makes a tool row. `fits` says whether a row (input, newline, target) fits the model's context.
    """

    def parse(line: str) -> Row:
        row = _parse_row(line)
        if not fits(f"{row.input}\n{row.target}"):
            raise _Reject("longer than the context")
        return row

    return _stream(log, parse)


def stream_texts(log: LineLog, fits: Callable[[str], bool]) -> Iterator[str]:
    """Texts of the file `log.path`, one per line, in file order; rejected lines are noted in `log`.

    Only a newline ends a line; a carriage return or Unicode line separator inside a line becomes a space, so that every
    later reader sees a text as one line.
    """

    def parse(line: str) -> str:
        text = " ".join(line.splitlines()).strip()
        if not text:
            raise _Reject("empty")
        if not fits(text):
            raise _Reject("longer than the context")
        return text

    return _stream(log, parse)


def _stream(log: LineLog, parse: Callable[[str], T]) -> Iterator[T]:
    for raw in raw_lines(log.path):
        log.lines += 1
        try:
            if len(raw) > MAX_LINE_BYTES:
                raise _Reject("line longer than 1 MiB")
            try:
                line = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _Reject("not UTF-8", f"byte {error.start + 1}") from None
            item = parse(line)
        except _Reject as reject:
            log.reasons[reject.reason] += 1
            if len(log.first) < NAMED_REJECTS:
                detail = f" ({reject.detail})" if reject.detail else ""
                log.first.append(f"line {log.lines}: {reject.reason}{detail}")
        else:
            yield item


def implied_label(target: str) -> str:
    """The label of a row without one: a target that contains a tool call makes a tool row."""
    return "tool" if CALL_OPEN in target else "copy"


def raw_lines(path: str, limit: int = MAX_LINE_BYTES) -> Iterator[bytes]:
    """Lines of a file as bytes, without line endings and without a byte-order mark.

    A line longer than `limit` bytes is cut, to a part that is still longer than that. Raises `DataError` if the file
    cannot be read.
    """
    try:
        if Path(path).is_dir():
            raise DataError(f"{path} is a folder, not a file")
        with open(path, "rb") as file:
            first = True
            while line := file.readline(limit + 2):
                rest = line
                while len(rest) == limit + 2 and not rest.endswith(b"\n"):
                    rest = file.readline(limit + 2)
                yield (line.removeprefix(codecs.BOM_UTF8) if first else line).rstrip(b"\r\n")
                first = False
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _parse_row(line: str) -> Row:
    if not line.strip():
        raise _Reject("empty")
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _Reject("not JSON", str(error)) from None
    if not isinstance(record, dict):
        raise _Reject("not a JSON object")
    text, target = _text(record, "input"), _text(record, "target")
    return make_row(text, target, _label(record, target))


def _text(record: dict[str, Any], name: str) -> str:
    value = record.get(name)
    if value is None:
        raise _Reject(f"no {name}")
    if not isinstance(value, str):
        raise _Reject(f"{name} is not text", type(value).__name__)
    if not value.strip():
        raise _Reject(f"{name} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Reject("not UTF-8", f"unpaired surrogate in {name}") from None
    return value


def _label(record: dict[str, Any], target: str) -> str:
    label = record.get("label")
    if label is None:
        return implied_label(target)
    if not isinstance(label, str) or label not in LABEL_NAMES:
        raise _Reject("unknown label", f"{label!r:.40}, allowed: {', '.join(sorted(LABEL_NAMES))}")
    return LABEL_NAMES[label]

"""A user's own files, streamed; rows that cannot be used are counted, and the first ones are quoted.

In: rows as JSON lines, CSV, Parquet or a dataset of the hub, or a text file with one text per line. Out: iterators of
rows or texts, and a `Log` of what was rejected and why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data.chat import KWARGS, Chat
from data.conversations import Message, Reject, holds_none, messages_of, text, text_of
from data.renderings import Renderings
from data.rows import DataError, Row, make_row
from data.shapes import Shape, shape_of
from data.sources import MAX_LINE_BYTES, Unreadable, open_source, raw_lines
from data.special import spelled_out

COLUMNS = ("input", "target", "label", "messages")
UNLABELLED = "all"
"""The subset of rows without a label."""
MAX_LABEL_CHARACTERS = 64
NAMED_REJECTS, NAMED_ALIKE = 10, 3
"""Rejected rows that are quoted: in all, and for one reason."""
SPECIAL = "the special token"
"""Part of each reason that speaks of one."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows are read: the file's names for our columns, the chat template (None: plain text), a function that says
    why the model cannot use a row (None: it can), and whether rows need a target.

    In the plain format `separator` comes between input and target; a row that spells out one of the tokenizer's
    `special` tokens is rejected or, with `special_tokens`, has it read as a token.
    """

    columns: Mapping[Any, str] = field(default_factory=dict)
    chat: Chat | None = None
    problem: Callable[[Row], str | None] = lambda row: None
    targets_needed: bool = True
    separator: str = "\n"
    special: tuple[str, ...] = ()
    special_tokens: bool = False


@dataclass
class Log:
    """What happened to a file's rows. `first` lists up to ten rejected ones, at most three per reason, as `line 7: not
    JSON (...)`; `notes` are assumptions made to read the file; `columns` and `keys` are the columns and message keys
    that have values, and whether anything uses them; `rendered` is how conversations compare with training's; `nulls`
    counts rows from whose messages or tools keys without a value were dropped."""

    path: str
    unit: str = "line"
    lines: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    columns: dict[str, bool] = field(default_factory=dict)
    keys: dict[str, bool] = field(default_factory=dict)
    rendered: Renderings | None = None
    nulls: int = 0

    @property
    def rejected(self) -> int:
        return self.reasons.total()

    @property
    def here(self) -> str:
        """Where the current row is, as in `line 7`."""
        return f"{self.unit} {self.lines}"

    def saw(self, columns: Iterable[str], used: Container[str], unread_keys: Iterable[str] = ()) -> None:
        """Records which columns of a row have values, which of these are used, and which message keys are not used."""
        for name in columns:
            self.columns[name] = self.columns.get(name, False) or name in used
        for key in unread_keys:
            self.keys[key] = False

    def sentences(self) -> list[str]:
        """What was assumed and what is not used, one fact each."""
        unused = [name for name, used in self.columns.items() if not used]
        sentences = [*self.notes]
        if unused:
            sentences.append(f"columns that are not used: {', '.join(unused)}")
        if self.keys:
            sentences.append(f"keys of messages that the chat template does not read: {', '.join(self.keys)}")
        if self.nulls:
            sentences.append(
                f"in {self.nulls} rows keys without a value (null) are left out of messages and tools, since Parquet "
                "files fill them in"
            )
        return [*sentences, *(self.rendered.sentences() if self.rendered else [])]

    def reject(self, reject: Reject) -> None:
        self.reasons[reject.reason] += 1
        if len(self.first) < NAMED_REJECTS and self.reasons[reject.reason] <= NAMED_ALIKE:
            self.first.append(f"{self.here}: {reject.reason}{f' ({reject.detail})' if reject.detail else ''}")

    def require(self, max_reject_fraction: float) -> None:
        """Raises `DataError` if more than that fraction of the rows was rejected, or if there were none."""
        if not self.lines:
            raise DataError(f"{self.path} is empty")
        if self.rejected > max_reject_fraction * self.lines:
            raise DataError(
                f"{self.path}: {self.rejected} of {self.lines} {self.unit}s cannot be used, more than the allowed "
                f"fraction of {max_reject_fraction:g}; the first: {'; '.join(self.first)}{self._hint()}"
            )

    def _hint(self) -> str:
        if any(SPECIAL in reason for reason in self.reasons):
            return "; data.special_tokens=tokens reads special tokens that are spelled out as tokens"
        return ""

    def as_dict(self) -> dict[str, Any]:
        """For the report: path, lines, rejected, reasons, first, notes and, of conversations, rendering."""
        return {
            "path": self.path,
            "lines": self.lines,
            "rejected": self.rejected,
            "reasons": dict(sorted(self.reasons.items())),
            "first": self.first,
            "notes": self.sentences(),
            **({"rendering": self.rendered.as_dict()} if self.rendered else {}),
        }


def stream_rows(log: Log, reading: Reading) -> Iterator[Row]:
    """Rows of `log.path` (see `data.sources.open_source`), in file order; rejected ones are noted in `log`.

    A row has `input` or `messages`, a list of {role, content}; and a `target`, or an assistant's message at the end. A
    label is any text or number. A row without a label is in the subset `all`. Files in the shapes of `data.shapes` are
    read as well.

    Raises `DataError` where the first row lacks a column that `reading` names, or shows that the file has another
    common shape.
    """
    source = open_source(log.path)
    log.unit, shape, first = source.unit, None, True
    log.notes += [source.note] if source.note else []
    if reading.chat is not None:
        log.rendered = Renderings(reading.chat.rendering)
    for record in source.records:
        log.lines += 1
        try:
            if isinstance(record, Unreadable):
                raise Reject(record.reason, record.detail)
            if first:
                first = False
                _check_columns(log.path, record, reading.columns)
                shape = shape_of(record, log.path, reading.columns)
                log.notes += [shape.note] if shape else []
            row = _row(record, reading, shape, log)
            if (problem := reading.problem(row)) is not None:
                raise Reject(problem)
        except Reject as reject:
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
                raise Reject("line longer than 1 MiB")
            try:
                text = " ".join(raw.decode("utf-8").splitlines()).strip()
            except UnicodeDecodeError as error:
                raise Reject("not UTF-8", f"byte {error.start + 1}") from None
            if not text:
                raise Reject("empty")
            if (reason := problem(Row(text, "", ""))) is not None:
                raise Reject(reason)
        except Reject as reject:
            log.reject(reject)
        else:
            yield text


def _check_columns(path: str, record: Mapping[str, Any], columns: Mapping[str, str]) -> None:
    for name, column in columns.items():
        if column not in record:
            raise DataError(f"data.columns.{name}: {path} has no column {column!r}; it has {', '.join(record)}")


def _row(record: Mapping[str, Any], reading: Reading, shape: Shape | None, log: Log) -> Row:
    column_of = {name: reading.columns.get(name, name) for name in COLUMNS}
    if "input" in reading.columns and "messages" not in reading.columns:
        del column_of["messages"]
    filled = [name for name, value in record.items() if value is not None]
    used = {*column_of.values(), *(shape.columns if shape else ())}
    extra = {name: value for name, value in record.items() if name not in used}
    if shape is not None:
        converted = shape.convert(record)
        kept = {"label", "target"} - set(converted)
        if (converted.get("messages") or [{}])[-1].get("role") == "assistant":
            kept.discard("target")  # the answer is there; a column of this name is something else
        record = {column_of[name]: value for name, value in converted.items()} | {
            column_of[name]: record.get(column_of[name]) for name in kept
        }
    values = {key: record.get(name) for key, name in column_of.items()}
    if values.get("messages") is not None:
        used.discard(column_of["input"])
    if reading.chat is not None:
        variables = reading.chat.variables(extra)
        log.saw(filled, {*used, *variables, *([KWARGS] if KWARGS in extra else [])})
        return _in_chat(record, values, variables, reading, log)
    log.saw(filled, used)
    if values.get("messages") is not None:
        raise Reject("messages need data.format chat")
    input_text = _input(values["input"], record)
    target = "" if values["target"] is None else text(values["target"], "target")
    if not target and reading.targets_needed:
        raise Reject("no target")
    if not reading.special_tokens:
        for name, value in (("input", input_text), ("target", target)):
            if (token := spelled_out([value], reading.special)) is not None:
                raise Reject(f"{name} contains {SPECIAL} {token}")
    tokens = reading.special_tokens and spelled_out([input_text, target], reading.special) is not None
    return make_row(input_text, target, _label(values["label"]), separator=reading.separator, special_tokens=tokens)


def _in_chat(
    record: Mapping[str, Any], values: Mapping[str, Any], variables: Mapping[str, Any], reading: Reading, log: Log
) -> Row:
    assert reading.chat is not None
    answer: Message | None = None
    if values.get("messages") is not None:
        messages = messages_of(values["messages"])
        if values["target"] is None and messages[-1]["role"] == "assistant":
            *messages, answer = messages
    else:
        messages = [{"role": "user", "content": _input(values["input"], record)}]
    if not messages:
        raise Reject("messages hold an answer and no question")
    if values["target"] is not None:
        answer = {"role": "assistant", "content": text(values["target"], "target")}
    if answer is None and reading.targets_needed:
        raise Reject("no target")
    label = _label(values["label"])
    try:
        rendered = reading.chat.render(messages, answer, variables)
        unread = reading.chat.unread_keys([*messages, *([answer] if answer else [])], variables)
    except DataError as error:
        raise Reject(str(error)) from None
    log.nulls += holds_none([values.get("messages"), *(record.get(name) for name in variables)])
    assert log.rendered is not None
    log.rendered.add(log.here, rendered)
    log.saw((), (), unread)
    input_text = "\n".join(filter(None, map(text_of, messages)))
    return rendered.row(input_text, label)


def _input(value: Any, record: Mapping[str, Any]) -> str:
    if value is None:
        raise Reject("no input", f"it has {', '.join(record)}")
    return text(value, "input")


def _label(value: Any) -> str:
    if value is None or value == "":
        return UNLABELLED
    if isinstance(value, bool | float | list | dict):
        raise Reject("label is neither text nor a whole number", type(value).__name__)
    label = " ".join(text(str(value), "label").split())
    if len(label) > MAX_LABEL_CHARACTERS:
        raise Reject(f"label longer than {MAX_LABEL_CHARACTERS} characters")
    return label

"""Where rows come from: JSON lines, JSON arrays, CSV, Parquet, or a dataset of the hub, record by record.

In: a path or a dataset's name. Out: what a record is called there (line, row), and an iterator of dictionaries, with an
`Unreadable` in place of each record that cannot be read. Only the current record is in memory, or the text of a JSON
array.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.rows import DataError, one_line

MAX_LINE_BYTES = 1 << 20
JSON_LINES = (".jsonl", ".json", ".ndjson")
COLUMNS_OF_ROWS = {"input", "messages", "instruction", "prompt", "conversations", "question", "text"}
"""Columns by which an object in a list is recognised as a row."""
SEPARATORS = {".csv": ",", ".tsv": "\t"}
DATASET = re.compile(r"^(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.-]+))?$", re.ASCII)
KINDS = f"a file ending in {', '.join((*JSON_LINES, *SEPARATORS, '.parquet'))}, nor a hub dataset OWNER/NAME[:SPLIT]"


class Unreadable(NamedTuple):
    """A record that cannot be read: a short reason, and a detail about this one."""

    reason: str
    detail: str = ""


Records = Iterator[dict[str, Any] | Unreadable]


class Source(NamedTuple):
    """What a record is called (line, record or row), the records, and what was assumed to read them, if anything."""

    unit: str
    records: Records
    note: str = ""


def open_source(source: str) -> Source:
    """The records of a file or dataset.

    Raises `DataError` if the source is not of a known kind, or cannot be read.
    """
    is_dataset(source)
    suffix = Path(source).suffix.lower()
    if suffix in JSON_LINES:
        return _json(source)
    if suffix in SEPARATORS:
        separator, note = _separator(source, SEPARATORS[suffix])
        return Source("row", _csv(source, separator), note)
    if suffix == ".parquet":
        return Source("row", _parquet(source))
    dataset = DATASET.match(source)
    assert dataset is not None, "checked by `is_dataset`"
    return Source("row", _dataset(dataset["name"], dataset["split"] or "train"))


def is_dataset(source: str, key: str = "rows") -> bool:
    """Whether the source is a dataset of the hub, not a file; raises `DataError` if it is neither."""
    if Path(source).suffix.lower() in (*JSON_LINES, *SEPARATORS, ".parquet"):
        return False
    if DATASET.match(source) is None or Path(source).is_file():
        raise DataError(f"{key}: {source} is neither {KINDS}")
    return True


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
                chunk = line
                while len(chunk) == limit + 2 and not chunk.endswith(b"\n"):
                    chunk = file.readline(limit + 2)
                yield (line.removeprefix(codecs.BOM_UTF8) if first else line).rstrip(b"\r\n")
                first = False
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _json(path: str) -> Source:
    """JSON lines, or a JSON array; raises `DataError` for a file that is one JSON object."""
    lines = raw_lines(path)
    first = next((line.strip() for line in lines if line.strip()), b"")
    more = next((True for line in lines if line.strip()), False)
    if first.startswith(b"["):
        return Source("record", _json_array(path), "read as a JSON array")
    if first.startswith(b"{") and (holder := _only_object(path, first, more)) is not None:
        inside = next((name for name, value in holder.items() if isinstance(value, list | dict)), None)
        hint = f" (its rows may be in {inside!r})" if inside else ""
        raise DataError(f"{path} holds a single JSON object{hint}: give one object a line, or an array of objects")
    return Source("line", _json_lines(path))


LARGEST_OBJECT = 1 << 26
"""Bytes of a file that is read whole to see whether it is one JSON object; a larger one is taken for lines."""


def _only_object(path: str, first: bytes, more: bool) -> dict[str, Any] | None:
    """The object that a file consists of, written over several lines, or with the rows in one of its fields."""
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        if Path(path).stat().st_size > LARGEST_OBJECT:
            return None
        try:
            value = json.loads(Path(path).read_text(encoding="utf-8-sig")) if more else None
        except (ValueError, RecursionError):
            return None
        return value if isinstance(value, dict) else None
    inside = [entry[0] for entry in value.values() if isinstance(entry, list) and entry and isinstance(entry[0], dict)]
    return value if not more and any(not COLUMNS_OF_ROWS.isdisjoint(first_entry) for first_entry in inside) else None


def _json_array(path: str) -> Records:
    """The records of a JSON array, parsed one after another."""
    try:
        content = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"cannot read {path} as a JSON array (not UTF-8, byte {error.start + 1})") from None
    decoder, at = json.JSONDecoder(), _skip(content, content.index("[") + 1)
    try:
        while content[at : at + 1] != "]":
            record, at = decoder.raw_decode(content, at)
            yield record if isinstance(record, dict) else Unreadable("not a JSON object")
            at = _skip(content, at)
            if content[at : at + 1] == ",":
                at = _skip(content, at + 1)
            elif content[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' or ']'", content, at)
    except (ValueError, RecursionError) as error:
        raise DataError(f"cannot read {path} as a JSON array ({error})") from None
    if content[at + 1 :].strip():
        raise DataError(
            f"cannot read {path} as a JSON array: there is more after its end (in JSON lines, each line is an object, "
            'such as {"messages": [...]})'
        )


def _skip(text: str, at: int) -> int:
    """The first place from `at` on that is not white space."""
    while text[at : at + 1].isspace():
        at += 1
    return at


def _json_lines(path: str) -> Records:
    for raw in raw_lines(path):
        if len(raw) > MAX_LINE_BYTES:
            yield Unreadable("line longer than 1 MiB")
            continue
        try:
            line = raw.decode("utf-8")
            record = json.loads(line) if line.strip() else Unreadable("empty")
        except UnicodeDecodeError as error:
            yield Unreadable("not UTF-8", f"byte {error.start + 1}")
        except (ValueError, RecursionError) as error:
            yield Unreadable("not JSON", str(error))
        else:
            yield record if isinstance(record, dict | Unreadable) else Unreadable("not a JSON object")


def _separator(path: str, usual: str) -> tuple[str, str]:
    """A file's column separator, and a note if it is not the one that the file's name implies.

    Raises `DataError` if the header is ambiguous.
    """
    header = ""
    for line in raw_lines(path):
        header = re.sub(r'"[^"]*"', "", line.decode("utf-8", errors="replace"))
        break
    names = {",": "commas", ";": "semicolons", "\t": "tabs"}
    separators = [separator for separator in names if separator in header]
    if len(separators) > 1 or (separators and usual == "\t" and separators != ["\t"]):
        raise DataError(
            f"{path}: its header has {' and '.join(map(names.__getitem__, separators))}, so it is not clear what "
            f"separates its columns; use only {names[usual]}, and put names that contain another of these in quotes"
        )
    separator = separators[0] if separators else usual
    return separator, f"columns are separated by {names[separator]}" if separator != usual else ""


def _csv(path: str, separator: str) -> Records:
    csv.field_size_limit(MAX_LINE_BYTES)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=separator, strict=True)
            names = reader.fieldnames or []
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise DataError(f"{path} has two columns {twice!r}")
            for record in reader:
                if None in record or None in record.values():
                    yield Unreadable("more or fewer fields than the header")
                else:
                    yield {name: value or None for name, value in record.items()}
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} as CSV ({error})") from None


def _parquet(path: str) -> Records:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:
        # ValueError: a text that is not UTF-8; OverflowError: a date that Python has no value for
        raise DataError(f"cannot read {path} as Parquet ({one_line(error)})") from None


def _dataset(name: str, split: str) -> Records:
    import datasets
    from huggingface_hub import HfApi

    try:
        if not Path(name).is_dir():
            HfApi().dataset_info(name, timeout=10)  # one attempt; the stream below would retry for half a minute
        yield from datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # the hub's client raises a different type for each way of failing
        raise DataError(f"cannot read split {split} of the dataset {name} ({one_line(error)})") from None

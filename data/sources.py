"""Where rows come from: JSON lines, CSV, Parquet, or a dataset of the hub, record by record.

In: a path or a dataset's name. Out: what a record is called there, and an iterator of dictionaries; a record that
cannot be read is an `Unreadable` in its place. Nothing is held in memory but the record at hand.
"""

from __future__ import annotations

import codecs
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.rows import DataError

MAX_LINE_BYTES = 1 << 20
JSON_LINES = (".jsonl", ".json", ".ndjson")
SEPARATORS = {".csv": ",", ".tsv": "\t"}
DATASET = re.compile(r"^(?P<name>[\w.-]+/[\w.-]+)(?::(?P<split>[\w.-]+))?$", re.ASCII)
KINDS = f"a file ending in {', '.join((*JSON_LINES, *SEPARATORS, '.parquet'))}, nor a hub dataset OWNER/NAME[:SPLIT]"


class Unreadable(NamedTuple):
    """A record that cannot be read: a short reason, and a detail about this one."""

    reason: str
    detail: str = ""


Records = Iterator[dict[str, Any] | Unreadable]


def records(source: str) -> tuple[str, Records]:
    """What a record is called (line or row), and the records.

    Raises `DataError` where the source is none of the known kinds, or cannot be read.
    """
    is_dataset(source)
    suffix = Path(source).suffix.lower()
    if suffix in JSON_LINES:
        return "line", _json_lines(source)
    if suffix in SEPARATORS:
        return "row", _csv(source, SEPARATORS[suffix])
    if suffix == ".parquet":
        return "row", _parquet(source)
    dataset = DATASET.match(source)
    assert dataset is not None, "`is_dataset` has been asked"
    return "row", _dataset(dataset["name"], dataset["split"] or "train")


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
                rest = line
                while len(rest) == limit + 2 and not rest.endswith(b"\n"):
                    rest = file.readline(limit + 2)
                yield (line.removeprefix(codecs.BOM_UTF8) if first else line).rstrip(b"\r\n")
                first = False
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


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


def _csv(path: str, separator: str) -> Records:
    csv.field_size_limit(MAX_LINE_BYTES)
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            for record in csv.DictReader(file, delimiter=separator, strict=True):
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
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {path} as Parquet ({_short(error)})") from None


def _dataset(name: str, split: str) -> Records:
    import datasets
    from huggingface_hub import HfApi

    try:
        if not Path(name).is_dir():
            HfApi().dataset_info(name, timeout=10)  # one attempt; the stream below would retry for half a minute
        yield from datasets.load_dataset(name, split=split, streaming=True)
    except Exception as error:  # the hub's client raises a different type for each way of failing
        raise DataError(f"cannot read split {split} of the dataset {name} ({_short(error)})") from None


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__

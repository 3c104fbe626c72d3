"""The row that every stage reads and writes, and its files.

In: rows in memory, or a JSON-lines file written by `write_rows`. Out: the other of the two; files are written under a
temporary name and renamed, so a reader never sees half a file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.files import replacing

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


class DataError(ValueError):
    """A file or setting that cannot provide the rows needed; the message is one sentence that a user can act on."""


def one_line(error: BaseException, most: int = 200) -> str:
    """An exception's message without line breaks, cut to `most` characters, to quote in a sentence."""
    return " ".join(str(error).split())[:most] or type(error).__name__


@dataclass(frozen=True, slots=True)
class Row:
    """One prompt and the answer it should get (empty: not known yet).

    `template` and `operands` (the request with its numbers masked, and those numbers) identify an exercise: two prompts
    that share both differ only in context. See `request_identity`. In a chat format `prompt` is the conversation as
    rendered by the chat template, `end` the token that ends an answer, and `input` the text of the messages. In the
    plain format `separator` comes between input and target. With `special_tokens`, special tokens that are spelled out
    in the target (in the plain format also in the input) are read as tokens, otherwise as plain characters. An
    `unfinished` target is a model's answer that was cut, so no end token follows it.
    """

    input: str
    target: str
    label: str
    template: str = ""
    operands: str = ""
    prompt: str = ""
    end: str = ""
    separator: str = "\n"
    special_tokens: bool = False
    unfinished: bool = False


_OPTIONAL = {"prompt": "", "end": "", "separator": "\n", "special_tokens": False, "unfinished": False}
"""Fields that a file leaves out where they have these values."""


def slug(label: str) -> str:
    """A label as part of a file's name: itself if it is plain, else its plain characters and a hash."""
    plain = re.sub(r"[^A-Za-z0-9_-]+", "-", label)
    return plain if plain == label else f"{plain[:40]}-{hashlib.blake2b(label.encode(), digest_size=4).hexdigest()}"


def request_identity(text: str) -> tuple[str, str]:
    """(template, operands) of a prompt: its sentences with numbers, with the numbers masked, and the numbers.

    A sentence without a digit ("I am stuck on my homework.") is context and does not count, so the same request after
    two different openings has one identity. A text without any digits is its own template.

    >>> request_identity("Help me out. What is 12 + 7.5?")
    ('what is # + #?', '12 7.5')
    """
    parts = _SENTENCE_END.split(" ".join(text.split()).casefold())
    request = " ".join(part for part in parts if _NUMBER.search(part)) or " ".join(parts)
    return _NUMBER.sub("#", request), " ".join(_NUMBER.findall(request))


def make_row(
    text: str,
    target: str,
    label: str,
    prompt: str = "",
    end: str = "",
    separator: str = "\n",
    special_tokens: bool = False,
) -> Row:
    """A `Row` with its identity filled in."""
    return Row(text, target, label, *request_identity(text), prompt, end, separator, special_tokens)


def read_rows(path: str | Path) -> list[Row]:
    """Rows of a file written by `write_rows`.

    Raises `DataError`, naming file and line, if a line is not such a row; for files from elsewhere use `data.readers`,
    which counts and reports what it rejects.
    """
    rows = []
    try:
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                try:
                    rows.append(Row(**json.loads(line)))
                except (ValueError, TypeError) as error:
                    raise DataError(f"{path}, line {number}: not a row this program wrote ({error})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    return rows


def write_rows(path: str | Path, rows: Iterable[Row]) -> None:
    """Writes rows as JSON lines, atomically."""
    write_lines(path, (json.dumps(_record(row), ensure_ascii=False) for row in rows))


def _record(row: Row) -> dict[str, Any]:
    return {name: value for name, value in asdict(row).items() if name not in _OPTIONAL or value != _OPTIONAL[name]}


def write_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Writes UTF-8 lines ending in `\\n`, atomically."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)


def read_lines(path: str | Path) -> list[str]:
    """Lines of a UTF-8 text file written by `write_lines`; raises `DataError` if it cannot be read."""
    try:
        return Path(path).read_bytes().decode("utf-8").split("\n")[:-1]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

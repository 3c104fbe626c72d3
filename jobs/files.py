"""JSON result files, and the keys and manifests that say what they hold.

In: values and folders. Out: files with a checksum of their own text, written under a temporary name and then renamed,
so that a reader never sees half a file; and folders marked with the key of the settings that made them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from data.files import replacing
from jobs.errors import DamagedFileError

FORMAT = 2
"""Part of every key; raised when the meaning of results on disk changes."""
KEY = "key.json"
MANIFEST = "manifest.json"
_HEAD = '{{\n "sha256": "{}"'
"""The start of a file; the checksum covers what follows."""
_HEAD_BYTES = len(_HEAD.format("0" * 64))


def key_of(*parts: Any) -> str:
    """A short hash of JSON-like values, the same on any machine."""
    return short_hash(FORMAT, *parts)


def short_hash(*parts: Any) -> str:
    """Like `key_of`, for values that must not change with `FORMAT`, such as a seed."""
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Atomic: a reader sees either the old file or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(value, indent=1, sort_keys=True)
    body = (f",{text[1:]}" if value else "\n}").encode()
    with replacing(path) as temporary:
        temporary.write_bytes(_HEAD.format(hashlib.sha256(body).hexdigest()).encode() + body)


def read_json(path: Path) -> Any:
    """The value, or None if the file is missing. Raises DamagedFileError if it is not what `write_json` wrote."""
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DamagedFileError(path, f"cannot be read ({error.strerror})") from None
    head, body = text[:_HEAD_BYTES], text[_HEAD_BYTES:]
    if head != _HEAD.format(hashlib.sha256(body).hexdigest()).encode():
        raise DamagedFileError(path, "does not hold what was written to it")
    value = json.loads(text)
    del value["sha256"]
    return value


def is_for(folder: Path, key: str) -> bool:
    """Whether the contents of `folder` were made for this key."""
    content = read_json(folder / KEY)
    return content is not None and content["key"] == key


def keyed_folder(folder: Path, key: str) -> Path:
    """`folder`, emptied first if it holds results for another key."""
    if not is_for(folder, key):
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / KEY, {"key": key})
    return folder


def is_finished(folder: Path, key: str) -> bool:
    """Whether `folder` has a manifest with this key."""
    manifest = read_json(folder / MANIFEST)
    return manifest is not None and manifest["key"] == key


def finish(folder: Path, key: str, facts: dict[str, Any]) -> None:
    write_json(folder / MANIFEST, {"key": key, **facts})

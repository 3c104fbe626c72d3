"""The files of a sweep: how they are written, and whether they are whole.

In: values and folders. Out: JSON files with a checksum of their own text, written under a temporary name and then
renamed, so that a reader never sees half a file; folders marked with the key of the settings that made them; and what
is damaged. There are three ways to tell, by who writes a file:

- JSON results begin with a checksum, because many processes write them next to each other, each by itself.
- Activations hold a hash in their header (`trainers.checked_files`), for the same reason.
- Everything else, such as models and tables, is in another program's format. What made a folder of them seals it:
  `files.json` lists each file's size in bytes and SHA-256. So the driver never has to read a model or an adapter.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from data.files import replacing
from data.rows import sha256_of
from jobs.errors import DamagedFileError

FORMAT = 2
"""Part of every key; raised when the meaning of results on disk changes."""
KEY = "key.json"
MANIFEST = "manifest.json"
SEAL = "files.json"
CACHES = ("activations", "deltas/*/*/residual")
"""Folders of a sweep that are computed again when needed: no seal lists them, and no mirror has them."""
_CACHE_NAMES = {Path(pattern).name for pattern in CACHES}
SMALL = 2**20
"""Largest file in bytes that is hashed at each start of a sweep; larger ones are hashed when they are read for work."""
CHANGED = "does not hold what was written to it"
UNLISTED = "is not listed by what made it"
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
        raise DamagedFileError(path, CHANGED)
    value = json.loads(text)
    del value["sha256"]
    return value


def is_for(folder: Path, key: str) -> bool:
    """Whether the contents of `folder` were made for this key."""
    return (read_json(folder / KEY) or {}).get("key") == key


def keyed_folder(folder: Path, key: str) -> Path:
    """`folder`, emptied first if it holds results for another key."""
    if not is_for(folder, key):
        shutil.rmtree(folder, ignore_errors=True)
        write_json(folder / KEY, {"key": key})
    return folder


def is_finished(folder: Path, key: str) -> bool:
    """Whether `folder` has a manifest with this key."""
    return (read_json(folder / MANIFEST) or {}).get("key") == key


def finish(folder: Path, key: str, facts: dict[str, Any]) -> None:
    write_json(folder / MANIFEST, {"key": key, **facts})


OnFile = Callable[[Path], None]


class Damage(NamedTuple):
    """A file that is not as it was written, and how."""

    path: Path
    why: str


class Listed(NamedTuple):
    """A file's entry in a seal."""

    size: int
    sha256: str


def files_in(folder: Path) -> Iterator[Path]:
    """Every file in a folder (or the file itself), except temporary files and caches."""
    if folder.is_file():
        yield folder
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in _CACHE_NAMES and not _is_temporary(name))
        yield from (Path(parent) / name for name in sorted(names) if not _is_temporary(name))


def _is_temporary(name: str) -> bool:
    return name.startswith(".") or name.endswith(".tmp")


def seal(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Writes `files` (default: all files in `folder`) to the folder's `files.json`, except its own manifest, which is
    written later. Hashes that a nested seal lists are taken from it."""
    bookkeeping = {folder / SEAL, folder / MANIFEST}
    chosen = [path for path in (files_in(folder) if files is None else files) if path not in bookkeeping]
    recorded: dict[Path, Listed] = {}
    for path in chosen:
        if path.name == SEAL:
            recorded |= listed(path.parent)
    entries = {path: recorded.get(path) or Listed(path.stat().st_size, sha256_of(path)) for path in chosen}
    write_json(folder / SEAL, {"files": {os.path.relpath(path, folder): entry for path, entry in entries.items()}})


def listed(folder: Path) -> dict[Path, Listed]:
    """The entries of a folder's seal. Raises DamagedFileError if it is missing or cannot be read."""
    content = read_json(folder / SEAL)
    if content is None:
        raise DamagedFileError(folder / SEAL, "is missing")
    return {Path(os.path.normpath(folder / name)): Listed(*entry) for name, entry in content["files"].items()}


def _nearest(path: Path) -> Listed | None:
    """The entry of a file in the nearest seal above it that lists it."""
    for folder in path.parents:
        if (folder / SEAL).is_file() and path in (entries := listed(folder)):
            return entries[path]
    return None


def sealed_hash(path: Path) -> str:
    """A file's SHA-256 according to its seal. Raises DamagedFileError if no seal above lists it."""
    if (entry := _nearest(path)) is None:
        raise DamagedFileError(path, UNLISTED)
    return entry.sha256


def damage(path: Path, most_bytes: float = math.inf, on_file: OnFile = lambda path: None) -> Iterator[Damage]:
    """What is damaged: of a folder, the files in its seal; of a file, itself, by a seal above it or its own checksum.

    Sealed files larger than `most_bytes` are not hashed. Calls `on_file` after each file.
    """
    try:
        entries = listed(path) if path.is_dir() else {path: _nearest(path)}
    except DamagedFileError as error:
        yield Damage(error.path, error.why)
        return
    for file, entry in entries.items():
        why = own_damage(file) if entry is None else _mismatch(file, entry, most_bytes)
        if why:
            yield Damage(file, why)
        on_file(file)


def require(*paths: Path) -> None:
    """Raises DamagedFileError for the first damage of these files and sealed folders."""
    for path in paths:
        if broken := next(damage(path), None):
            raise DamagedFileError(*broken)


def own_damage(path: Path) -> str | None:
    """How a file is damaged that no seal lists, by its own checksum."""
    if not path.exists():
        return "is missing"
    if path.suffix == ".safetensors":
        from trainers.checked_files import is_intact

        return None if is_intact(path) else CHANGED
    if path.name == "index.json":  # of a folder of shards
        from trainers.activations import misfits

        return "does not fit the shards next to it" if misfits(path) else None
    if path.suffix != ".json":
        return UNLISTED
    try:
        read_json(path)
    except DamagedFileError as error:
        return error.why
    return None


def _mismatch(path: Path, entry: Listed, most_bytes: float) -> str | None:
    """How a file differs from its entry in a seal."""
    try:
        size = path.stat().st_size
        if size != entry.size:
            return f"has {size} bytes instead of {entry.size}"
        if size <= most_bytes and sha256_of(path) != entry.sha256:
            return CHANGED
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None

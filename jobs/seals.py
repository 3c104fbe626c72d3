"""Seals: sizes and hashes of the files of a finished piece of work, to detect damage later.

In: a folder. Out: `files.json` in it, with each file's size in bytes and SHA-256; and the files that no longer match.
The worker that made the files seals them, so that the driver never has to read a model or an adapter.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from data.rows import sha256_of
from jobs.errors import DamagedFileError
from jobs.files import MANIFEST, read_json, write_json

SEAL = "files.json"
CACHES = {"activations", "residual"}
"""Folders that are recomputed when needed; their files hold their own checksums (`trainers.checked_files`)."""
SMALL = 2**20
"""Largest file in bytes that is hashed at each start of a sweep; larger ones are hashed when they are read for work."""


Seen = Callable[[Path], None]


class Damage(NamedTuple):
    """A file that no longer matches its seal, and how."""

    path: Path
    why: str


class Listed(NamedTuple):
    size: int
    sha256: str


def files_in(folder: Path) -> Iterator[Path]:
    """Every file in a folder (or the file itself), except temporary files and caches."""
    if folder.is_file():
        yield folder
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in CACHES and not _is_temporary(name))
        yield from (Path(parent) / name for name in sorted(names) if not _is_temporary(name))


def _is_temporary(name: str) -> bool:
    return name.startswith(".") or name.endswith(".tmp")


def seal(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Writes `files` (default: all files in `folder`) to the folder's `files.json`, except its own manifest, which is
    written later. Hashes that a nested seal lists are taken from it."""
    own = {folder / SEAL, folder / MANIFEST}
    chosen = [path for path in (files_in(folder) if files is None else files) if path not in own]
    known: dict[Path, Listed] = {}
    for path in chosen:
        if path.name == SEAL:
            known |= listed(path.parent)
    entries = {path: known.get(path) or Listed(path.stat().st_size, sha256_of(path)) for path in chosen}
    write_json(folder / SEAL, {"files": {os.path.relpath(path, folder): entry for path, entry in entries.items()}})


def listed(folder: Path) -> dict[Path, Listed]:
    """The entries of a folder's seal. Raises DamagedFileError if it is missing or cannot be read."""
    content = read_json(folder / SEAL)
    if content is None:
        raise DamagedFileError(folder / SEAL, "is missing")
    return {Path(os.path.normpath(folder / name)): Listed(*entry) for name, entry in content["files"].items()}


def sealed_hash(path: Path) -> str:
    """A file's SHA-256 according to its seal. Raises DamagedFileError if no seal above lists it."""
    return _nearest(path).sha256


def _nearest(path: Path) -> Listed:
    """The entry of a file in the nearest seal above it."""
    for folder in path.parents:
        if (folder / SEAL).is_file() and path in (entries := listed(folder)):
            return entries[path]
    raise DamagedFileError(path, "is not listed by what made it")


def damage(folder: Path, most_bytes: float = math.inf, seen: Seen = lambda path: None) -> Iterator[Damage]:
    """Files in the folder's seal that are missing, truncated or changed. Larger files than `most_bytes` are not hashed.
    Calls `seen` after each file."""
    try:
        files = listed(folder)
    except DamagedFileError as error:
        yield Damage(error.path, error.why)
        return
    for path, entry in files.items():
        if why := _mismatch(path, entry, most_bytes):
            yield Damage(path, why)
        seen(path)


def require(*files: Path) -> None:
    """Raises DamagedFileError for the first of these files that does not match its seal; a folder stands for all files
    in its seal."""
    for path in files:
        if path.is_dir():
            broken = next(damage(path), None)
        else:
            why = _mismatch(path, _nearest(path), math.inf)
            broken = Damage(path, why) if why else None
        if broken is not None:
            raise DamagedFileError(*broken)


def _mismatch(path: Path, entry: Listed, most_bytes: float) -> str | None:
    try:
        size = path.stat().st_size
        if size != entry.size:
            return f"has {size} bytes instead of {entry.size}"
        if size <= most_bytes and sha256_of(path) != entry.sha256:
            return "does not hold what was written to it"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None

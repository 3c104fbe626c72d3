"""What a finished piece of work left, file by file: sizes and hashes, against which damage shows.

In: a folder. Out: `files.json` in it, which lists the files with their sizes in bytes and SHA-256, and what of them is
no longer as it was. A worker seals what it made, so that a driver never reads a model or an adapter to list it.
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
"""Folders that are made again when they are needed; their files hold their own checksums (`trainers.checked_files`)."""
SMALL = 2**20
"""Most bytes of a file that is hashed whenever a sweep starts; larger ones are when they are read for work."""


Seen = Callable[[Path], None]


class Damage(NamedTuple):
    """A file that is not as it was left, and what is wrong with it."""

    path: Path
    why: str


class Listed(NamedTuple):
    size: int
    sha256: str


def files_in(folder: Path) -> Iterator[Path]:
    """Every file of ours in a folder, itself if it is one: not those being written, and not those of caches."""
    if folder.is_file():
        yield folder
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(one for one in folders if one not in CACHES and not _passing(one))
        yield from (Path(parent) / one for one in sorted(names) if not _passing(one))


def _passing(name: str) -> bool:
    return name.startswith(".") or name.endswith(".tmp")


def seal(folder: Path, files: Iterable[Path] | None = None) -> None:
    """Lists `files`, all that lie in `folder` unless they are given, in its `files.json`; not its own manifest, which
    is written after that. What another seal among them lists is taken from there."""
    own = {folder / SEAL, folder / MANIFEST}
    chosen = [one for one in (files_in(folder) if files is None else files) if one not in own]
    known: dict[Path, Listed] = {}
    for path in chosen:
        if path.name == SEAL:
            known |= listed(path.parent)
    found = {path: known.get(path) or Listed(path.stat().st_size, sha256_of(path)) for path in chosen}
    write_json(folder / SEAL, {"files": {os.path.relpath(path, folder): one for path, one in found.items()}})


def listed(folder: Path) -> dict[Path, Listed]:
    """What the folder's seal lists. Raises DamagedFileError where it has none that can be read."""
    held = read_json(folder / SEAL)
    if held is None:
        raise DamagedFileError(folder / SEAL, "is missing")
    return {Path(os.path.normpath(folder / name)): Listed(*one) for name, one in held["files"].items()}


def sealed_hash(path: Path) -> str:
    """The SHA-256 of a file as it was left. Raises DamagedFileError where no seal above lists it."""
    return _nearest(path).sha256


def _nearest(path: Path) -> Listed:
    """A file as the nearest seal above it lists it."""
    for folder in path.parents:
        if (folder / SEAL).is_file() and path in (found := listed(folder)):
            return found[path]
    raise DamagedFileError(path, "is not listed by what made it")


def damage(folder: Path, most_bytes: float = math.inf, seen: Seen = lambda path: None) -> Iterator[Damage]:
    """What is missing, cut or changed of what the folder's seal lists; files above `most_bytes` are not read. `seen` is
    called after each file."""
    try:
        files = listed(folder)
    except DamagedFileError as error:
        yield Damage(error.path, error.why)
        return
    for path, one in files.items():
        if why := _wrong(path, one, most_bytes):
            yield Damage(path, why)
        seen(path)


def require(*files: Path) -> None:
    """Raises DamagedFileError for the first of these files that is not as it was left; of a folder, all that its seal
    lists."""
    for path in files:
        if path.is_dir():
            broken = next(damage(path), None)
        else:
            why = _wrong(path, _nearest(path), math.inf)
            broken = Damage(path, why) if why else None
        if broken is not None:
            raise DamagedFileError(*broken)


def _wrong(path: Path, one: Listed, most_bytes: float) -> str | None:
    try:
        size = path.stat().st_size
        if size != one.size:
            return f"has {size} bytes instead of {one.size}"
        if size <= most_bytes and sha256_of(path) != one.sha256:
            return "does not hold what was written to it"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None

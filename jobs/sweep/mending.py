"""Finds damaged files of a sweep, and removes them so that the stages rebuild them.

In: a `Context` whose sweep is not running. Out: the files that are damaged, missing, edited or added by hand. They are
moved to `set_aside/` in the sweep's folder, and their unit (a trial, a model, a cell) counts as not done, so that the
stages redo exactly that. The new files have the same bits, so results that depend on them stay valid; deltas, cells and
the finetuned model are keyed by their hashes, so results that depend on other bits do not.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from data.rows import sha256_of
from jobs.context.context import Context
from jobs.context.workspace import ASIDE, FINETUNED, START, VALIDATION_FILE
from jobs.errors import DamagedFileError
from jobs.files import (
    CACHES,
    CHANGED,
    KEY,
    MANIFEST,
    SEAL,
    SMALL,
    Damage,
    OnFile,
    damage,
    files_in,
    listed,
    own_damage,
    read_json,
    seal,
)
from jobs.sweep.pair import examine
from jobs.sweep.stage_list import STAGES, Stage

ADDED = "was not written by this sweep"
UNITS = (
    *("data/answered", "lora/trial_*", "lora/merged", "transcoders/layer_*"),
    *("deltas/*/*/d*/trial_*", "deltas/polished/d*", *CACHES[1:]),
)
"""Folders that are only ever rebuilt as a whole."""
JSON_FILES = (
    *(KEY, MANIFEST, SEAL, START, FINETUNED, VALIDATION_FILE),
    *("result.json", "best.json", "base_error.json", "cells/*.json", "checks_*.json"),
)
"""Files that hold their own checksums."""
MADE_WHOLE = ("data", "report")
"""Stages that start from scratch if they are not finished."""


def mend(context: Context, stages: tuple[Stage, ...]) -> None:
    """Prints a line for every damaged file, and leaves the sweep as if that work had never been done.

    Compares sizes, and hashes of small files. If any of `stages` has work left, which may read the large ones, compares
    all hashes.
    """
    for most_bytes in (SMALL, math.inf):
        _mend_model(context, most_bytes)
        for stage, broken in list(find(context, most_bytes)):
            _set_aside(context, stage, broken)
        if all(stage.finished(context) for stage in stages):
            return


def _mend_model(context: Context, most_bytes: float) -> None:
    """Rebuilds a damaged base model under the storage root."""
    folder = context.model
    if not folder.is_relative_to(context.space.models):
        return
    if not (folder / SEAL).is_file():  # just built
        seal(folder)
    if broken := next(damage(folder, most_bytes), None):
        context.progress.line(f"  {broken.path} {broken.why}: damaged, or edited by hand; rebuilt")
        shutil.rmtree(folder)
        vars(context).pop("source", None)  # a cached property
        if context.adopted is not None:
            examine(context)
        seal(context.model)


def find(
    context: Context, most_bytes: float = math.inf, on_file: OnFile = lambda path: None, caches: bool = False
) -> Iterator[tuple[Stage | None, Damage]]:
    """Yields damaged files, each with the stage that wrote it. Does not hash sealed files larger than `most_bytes`, and
    reads activations only if `caches`, since workers check them before use. Calls `on_file` after each file."""
    space = context.space
    cached = [path for path in cached_files(context) if caches or _is_json(path)]
    if space.data.is_dir() or (space.folder / START).is_file():
        cached.append(space.folder / START)
    yield from ((None, broken) for path in cached for broken in _own(path, on_file))
    for stage in STAGES:
        folder, files = stage.folder(context), stage.files(context)
        damages: Iterator[Damage] = iter(())
        if (folder / MANIFEST).is_file() or (folder / SEAL).is_file():  # a stage has both or neither
            damages = _of_finished(files, folder, most_bytes, on_file)
        elif stage.name not in MADE_WHOLE:
            damages = _of_unfinished(files, most_bytes, on_file)
        yield from ((stage, broken) for broken in damages)


def cached_files(context: Context) -> list[Path]:
    """Activations, and what else no seal lists because it is computed again when needed."""
    folders = [folder for pattern in CACHES for folder in sorted(context.space.folder.glob(pattern))]
    return [path for folder in folders for path in files_in(folder)]


def _of_finished(files: list[Path], folder: Path, most_bytes: float, on_file: OnFile) -> Iterator[Damage]:
    """Damage in a finished stage, whose seal lists all its files."""
    yield from _own(folder / MANIFEST, on_file)
    yield from damage(folder, most_bytes, on_file)
    with suppress(DamagedFileError):  # already yielded
        sealed = listed(folder)
        yield from (Damage(path, ADDED) for path in files if path not in sealed)


def _of_unfinished(files: list[Path], most_bytes: float, on_file: OnFile) -> Iterator[Damage]:
    """Damage in an unfinished stage: in files with their own checksums, and in those that its units' seals list."""
    for path in files:
        if _is_json(path) and (broken := [*_own(path, on_file)]):
            yield from broken
        elif path.name == SEAL:
            yield from damage(path.parent, most_bytes, on_file)
        elif _needs_seal(path):
            yield from _own(path.parent / SEAL, on_file)
        elif path.parent.name == "cells" and path.suffix != ".json":
            yield Damage(path, ADDED)
        elif path.parent.name == "cells" and (recorded := read_json(path).get("generations")):
            texts = path.parents[1] / "generations" / f"{path.stem}.jsonl"
            if not texts.is_file() or sha256_of(texts) != recorded:
                yield Damage(texts, CHANGED if texts.is_file() else "is missing")
            on_file(texts)


def _own(path: Path, on_file: OnFile) -> Iterator[Damage]:
    """The damage of a file with its own checksum, if any."""
    if why := own_damage(path):
        yield Damage(path, why)
    on_file(path)


def _is_json(path: Path) -> bool:
    return any(path.match(pattern) for pattern in JSON_FILES)


def _needs_seal(path: Path) -> bool:
    """Whether the file marks the work in its folder as done."""
    if path.parent.name == "answered":
        return path.name == "validation.jsonl"
    if path.name == "result.json":
        return read_json(path)["state"] == "COMPLETE"
    return path.name == MANIFEST and any(path.parent.match(pattern) for pattern in UNITS)


def _set_aside(context: Context, stage: Stage | None, broken: Damage) -> None:
    """Moves the file away and deletes what is made together with it."""
    folder = context.space.folder
    relative, moved = broken.path.relative_to(folder), ""
    if broken.path.exists():
        to = folder / ASIDE / relative
        to.parent.mkdir(parents=True, exist_ok=True)
        broken.path.replace(to)
        moved = f"; moved to {to.relative_to(folder)}"
    if broken.why == ADDED:
        context.progress.line(f"  {relative} {broken.why}{moved}")
        return
    context.progress.line(f"  {relative} {broken.why}: damaged, or edited by hand{moved}")
    if broken.path.name == KEY:
        shutil.rmtree(broken.path.parent, ignore_errors=True)
    for parent in relative.parents:
        if any(parent.match(pattern) for pattern in UNITS):
            shutil.rmtree(folder / parent, ignore_errors=True)
    if broken.path.parent in (context.space.cells, context.space.generations):
        (context.space.cells / f"{broken.path.stem}.json").unlink(missing_ok=True)
        (context.space.generations / f"{broken.path.stem}.jsonl").unlink(missing_ok=True)
    if stage is not None:
        stage.drop(context)

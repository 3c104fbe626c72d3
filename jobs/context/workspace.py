"""A sweep's folder on disk.

In: a storage root and a sweep's name. Out: the paths of everything in it, a lock, and checks that it is writable.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from jobs.errors import RequestError
from jobs.files import read_json, write_json
from sites import width_label

SETTINGS = "sweep.yaml"
"""The resolved settings."""
START = "start.json"
ASIDE = "set_aside"
"""Where damaged files are moved."""
TIMELINE = "timeline.jsonl"
"""When each task of the fan-out workers ran."""
FINETUNED = "finetuned.json"
PAIR = "pair.json"
"""What finetuning changed."""
VALIDATION_FILE = "validation.json"
"""The finetuned model's answers to the validation rows."""


class Workspace:
    """The paths of one sweep under a storage root."""

    def __init__(self, root: Path, name: str) -> None:
        self.root = root
        self.name = name
        self.folder = root / "sweeps" / name
        self.models = root / "models"
        self.data = self.folder / "data"
        self.answered = self.data / "answered"
        self.lora = self.folder / "lora"
        self.activations = self.folder / "activations"
        self.transcoders = self.folder / "transcoders"
        self.deltas = self.folder / "deltas"
        self.cells = self.folder / "cells"
        self.generations = self.folder / "generations"
        self.report = self.folder / "report"

    @property
    def start(self) -> str:
        """Id of this start of the sweep, which changes with `--fresh`; created on first use."""
        content = read_json(self.folder / START)
        if content is None:
            content = {"start": uuid.uuid4().hex[:12]}
            write_json(self.folder / START, content)
        return content["start"]

    def create(self) -> None:
        """Creates the folder; raises RequestError if it cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            probe = self.folder / f".probe.{os.getpid()}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise RequestError(f"storage.root: {self.folder} cannot be written ({error.strerror})") from None

    def polished(self, d_new: int) -> Path:
        """The folder of the deltas of one width that were polished together."""
        return self.deltas / "polished" / width_label(d_new)

    def check_space(self, needed: int, fresh: bool = False) -> None:
        """Raises RequestError if less than `needed` bytes are free, or would be without this sweep's files if it starts
        over (`fresh`)."""
        free = shutil.disk_usage(self.folder).free
        if fresh:
            free += sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        if free < needed:
            raise RequestError(
                f"storage.root: the sweep needs about {needed / 1e9:.1f} GB under {self.root}, "
                f"but only {free / 1e9:.1f} GB are free"
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """A lock that one driver at a time can hold; a second one is refused."""
        lock = FileLock(self.folder / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise RequestError(
                f"another process is running the sweep in {self.folder}; wait for it or stop it"
            ) from None
        try:
            yield
        finally:
            lock.release()

    def clear(self, keep: Collection[str] = ()) -> None:
        """Removes every result of the sweep, except its lock and the files named in `keep`."""
        for path in self.folder.iterdir():
            if path.name not in (".lock", *keep):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def replica_folder(trial: Path, rank: int) -> Path:
    """Folder of a trial's replica (seed), ranked by validation loss; rank 0, the best, is in the trial's own folder."""
    return trial / f"replica_{rank}" if rank else trial


def storage_root(root: str) -> Path:
    """`root` as an absolute path.

    A submitted job runs in a copy of the repository that Ray deletes afterwards, so a relative root is then resolved
    against `~/deltascope`.
    """
    path = Path(root).expanduser()
    if path.is_absolute():
        return path
    here = Path.cwd()
    if "runtime_resources" in here.parts:
        return Path.home() / "deltascope" / path
    return here / path

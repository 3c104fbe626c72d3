"""A sweep's results at a URL too: sent there as they land, fetched from there by a machine that has none of them.

In: a sweep's folder and a URL that fsspec knows (s3://bucket/runs, gs://..., file:///...). Out: URL/NAME holds the
folder's files but for activations and base errors, which a later stage makes again where it needs them. Files go in the
order they were written, so what says that something is finished never arrives before it.
"""

from __future__ import annotations

import json
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import fsspec

from jobs.addresses import without_secrets
from jobs.errors import RequestError
from jobs.files import read_json, write_json
from jobs.study.workspace import START

PASS_SECONDS = 20.0
LEDGER = ".mirror.json"
"""What was sent of this folder, each file with its size and time, and under which writer's name."""
WRITER = "writer.json"
"""Who sent last; at the URL only."""
LEFT_OUT = {"activations", "residual"}


@contextmanager
def mirrored(url: str | None, folder: Path, fresh: bool, say: Callable[[str], None]) -> Iterator[None]:
    """While a sweep runs in `folder`, what it finishes is sent to `url`; before, a folder without results is filled.

    Raises RequestError where the URL cannot be used, or holds results that another machine sent since this one did;
    `fresh` replaces whatever is there. A URL that stops answering does not stop the sweep.
    """
    if url is None:
        yield
        return
    mirror = Mirror(url, folder, say)
    mirror.open(fresh)
    ended = threading.Event()
    sender = threading.Thread(target=mirror.follow, args=(ended,), name="mirror", daemon=True)
    sender.start()
    try:
        yield
    finally:
        ended.set()
        sender.join()


class Mirror:
    """The files of one sweep, here and at the URL."""

    def __init__(self, url: str, folder: Path, say: Callable[[str], None] = lambda text: None) -> None:
        self._folder, self._say = folder, say
        self._shown = f"storage.mirror: {without_secrets(url)}"
        self._sent: dict[str, list[int] | None] = {}
        self._writer = uuid.uuid4().hex[:12]
        try:
            self._files, root = fsspec.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise RequestError(f"{self._shown} cannot be used ({error})") from None
        self._root = f"{root.rstrip('/')}/{folder.name}"

    def open(self, fresh: bool = False) -> None:
        """Fetches what is there if nothing of it is here, and signs as the one who sends from now on."""
        try:
            there, writer = self._there(), self._signed()
            ledger = read_json(self._folder / LEDGER) or {"writer": None, "sent": {}}
            self._sent = dict.fromkeys(there)
            if writer is not None and not fresh:
                if writer == ledger["writer"]:
                    self._sent |= ledger["sent"]
                elif (self._folder / START).is_file():
                    raise RequestError(
                        f"{self._shown} holds results of {self._folder.name} that another machine sent since this one "
                        f"did; remove {self._folder} to go on from them, or say --fresh to replace them"
                    )
                else:
                    self._fetch(there)
            self._files.makedirs(self._root, exist_ok=True)
            self._files.pipe_file(f"{self._root}/{WRITER}", json.dumps({"writer": self._writer}).encode())
            self._note()
        except RequestError:
            raise
        except Exception as error:  # each file system raises its own
            raise RequestError(f"{self._shown} does not answer ({type(error).__name__}: {error})") from None

    def follow(self, ended: threading.Event) -> None:
        """Sends until the sweep has ended, and once more then."""
        away = last = False
        while not last:
            last = ended.wait(PASS_SECONDS)
            try:
                if self._signed() != self._writer:
                    self._say(f"  {self._shown} is written by another machine now; nothing more is sent from here")
                    return
                self.send()
                away = False
            except Exception as error:  # each file system raises its own, and none of them stops a sweep
                if not away or last:
                    later = "the next run of the same command sends it" if last else "it is tried again"
                    self._say(f"  {self._shown} does not take results ({type(error).__name__}: {error}); {later}")
                away = True

    def send(self) -> None:
        """Brings the URL in line with the folder: first what is gone here, then what is new, oldest first."""
        here = self._here()
        for name in [name for name in self._sent if name not in here]:
            self._files.rm_file(f"{self._root}/{name}")
            del self._sent[name]
        for name, stamp in sorted(here.items(), key=lambda item: item[1][1]):
            if self._sent.get(name) == stamp:
                continue
            path, target = self._folder / name, f"{self._root}/{name}"
            try:
                self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(path), target)
            except FileNotFoundError:
                if path.exists():
                    raise
                continue  # replaced or emptied since it was listed
            self._sent[name] = stamp
        self._note()

    def _note(self) -> None:
        write_json(self._folder / LEDGER, {"writer": self._writer, "sent": self._sent})

    def _here(self) -> dict[str, list[int]]:
        found = {}
        for parent, folders, names in os.walk(self._folder):
            folders[:] = [one for one in folders if one not in LEFT_OUT and not one.startswith(".")]
            for name in names:
                path = Path(parent) / name
                if name.startswith(".") or name.endswith(".tmp"):
                    continue
                try:
                    stat = path.stat()
                except FileNotFoundError:
                    continue
                found[path.relative_to(self._folder).as_posix()] = [stat.st_size, stat.st_mtime_ns]
        return found

    def _there(self) -> list[str]:
        self._files.invalidate_cache()
        if not self._files.exists(self._root):
            return []
        names = [path[path.index(self._root) + len(self._root) + 1 :] for path in self._files.find(self._root)]
        return [name for name in names if name != WRITER]

    def _signed(self) -> str | None:
        try:
            held: dict[str, Any] = json.loads(self._files.cat_file(f"{self._root}/{WRITER}"))
        except FileNotFoundError:
            return None
        return held["writer"]

    def _fetch(self, names: list[str]) -> None:
        """The file that tells a begun sweep comes last: a fetch that was cut short is done again."""
        self._say(f"fetching {len(names)} files from {self._shown.partition(' ')[2]}")
        for name in sorted(names, key=lambda name: name == START):
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files.get_file(f"{self._root}/{name}", str(path))
            stat = path.stat()
            self._sent[name] = [stat.st_size, stat.st_mtime_ns]

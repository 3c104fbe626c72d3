"""A copy of a sweep's results at a URL: uploaded as they are written, and downloaded by a machine that has none.

In: a sweep's folder and a URL that fsspec understands (s3://bucket/runs, gs://..., file:///...). Out: URL/NAME holds
the folder's files, except activations and base errors, which a later stage recomputes if it needs them. Files are sent
in the order they were written, so a file that marks something as finished never arrives before the thing itself.
"""

from __future__ import annotations

import json
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import fsspec

from jobs.cluster import environment
from jobs.context.workspace import ASIDE, START
from jobs.errors import RequestError, without_secrets
from jobs.files import files_in, read_json, write_json

PASS_SECONDS = 20.0
LEDGER = ".mirror.json"
"""The files of this folder that were sent, with size and time, and this writer's name."""
WRITER = "writer.json"
"""The name of the last sender; exists only at the URL."""


@contextmanager
def mirrored(url: str | None, folder: Path, fresh: bool, say: Callable[[str], None]) -> Iterator[None]:
    """While a sweep runs in `folder`, sends its results to `url`; a folder without results is first filled from there.

    Raises RequestError if the URL cannot be used, or if another machine has sent results to it since this one last did;
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
        environment.stop_may_take_long()  # a stopped sweep still sends the rest
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
        """Fetches the results at the URL if there are none here, and registers this machine as the sender."""
        try:
            remote, writer = self._remote_names(), self._current_writer()
            ledger = read_json(self._folder / LEDGER) or {"writer": None, "sent": {}}
            self._sent = dict.fromkeys(remote)
            if writer is not None and not fresh:
                if writer in (ledger["writer"], ledger.get("next")):
                    self._sent |= ledger["sent"]
                elif (self._folder / START).is_file():
                    raise RequestError(
                        f"{self._shown} holds newer results of {self._folder.name}, sent by another machine; "
                        f"remove {self._folder} to continue from them, or pass --fresh to replace them"
                    )
                else:
                    self._fetch(remote)
            self._files.makedirs(self._root, exist_ok=True)
            # First here: after a kill in between, this machine must still know the name that it has given itself there.
            write_json(self._folder / LEDGER, {**ledger, "next": self._writer})
            self._files.pipe_file(f"{self._root}/{WRITER}", json.dumps({"writer": self._writer}).encode())
            self._note()
        except RequestError:
            raise
        except Exception as error:  # each file system has its own exceptions
            raise RequestError(f"{self._shown} does not answer ({type(error).__name__}: {error})") from None

    def follow(self, ended: threading.Event) -> None:
        """Sends repeatedly until the sweep has ended, then once more."""
        failing = last = False
        while not last:
            last = ended.wait(PASS_SECONDS)
            try:
                if self._current_writer() != self._writer:
                    self._say(f"  another machine is now writing to {self._shown}; this one stops sending")
                    return
                self.send()
                failing = False
            except Exception as error:  # each file system has its own exceptions, and none of them stops a sweep
                if not failing or last:
                    later = "the next run of the same command will send them" if last else "will try again"
                    self._say(f"  {self._shown}: could not send results ({type(error).__name__}: {error}); {later}")
                failing = True

    def send(self) -> None:
        """Synchronises the URL with the folder: deletes what is gone here, then sends what is new, oldest first."""
        local = self._local_files()
        for name in [name for name in self._sent if name not in local]:
            with suppress(FileNotFoundError):  # deleted by a run that was killed before it could note that
                self._files.rm_file(f"{self._root}/{name}")
            del self._sent[name]
        for name, stamp in sorted(local.items(), key=lambda item: item[1][1]):
            if self._sent.get(name) == stamp:
                continue
            path, target = self._folder / name, f"{self._root}/{name}"
            try:
                self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
                self._files.put_file(str(path), target)
            except FileNotFoundError:
                if path.exists():
                    raise
                continue  # replaced or removed since it was listed
            self._sent[name] = stamp
        self._note()

    def _note(self) -> None:
        write_json(self._folder / LEDGER, {"writer": self._writer, "sent": self._sent})

    def _local_files(self) -> dict[str, list[int]]:
        stamps = {}
        for path in files_in(self._folder):
            name = path.relative_to(self._folder)
            with suppress(FileNotFoundError):
                if name.parts[0] != ASIDE:
                    stat = path.stat()
                    stamps[name.as_posix()] = [stat.st_size, stat.st_mtime_ns]
        return stamps

    def _remote_names(self) -> list[str]:
        self._files.invalidate_cache()
        if not self._files.exists(self._root):
            return []
        names = [path[path.index(self._root) + len(self._root) + 1 :] for path in self._files.find(self._root)]
        return [name for name in names if name != WRITER]

    def _current_writer(self) -> str | None:
        try:
            content: dict[str, Any] = json.loads(self._files.cat_file(f"{self._root}/{WRITER}"))
        except FileNotFoundError:
            return None
        return content["writer"]

    def _fetch(self, names: list[str]) -> None:
        """Fetches `START` last, so that an interrupted fetch is repeated."""
        self._say(f"fetching {len(names)} files from {self._shown.partition(' ')[2]}")
        for name in sorted(names, key=lambda name: name == START):
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files.get_file(f"{self._root}/{name}", str(path))
            stat = path.stat()
            self._sent[name] = [stat.st_size, stat.st_mtime_ns]

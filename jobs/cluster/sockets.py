"""Ray's temporary folder: a Ray that we start keeps its sockets there, and a socket's path must be short.

In: RAY_TMPDIR or TMPDIR, whichever Ray uses. Out: nothing, or a RequestError that says what to set. Without this check
Ray would fail after the first stages, in some cases only after half a minute.
"""

from __future__ import annotations

import os
from pathlib import Path

from jobs.errors import RequestError

VARIABLES = ("RAY_TMPDIR", "TMPDIR")
"""In the order in which Ray looks at them."""
DEFAULT = "/tmp"
LONGEST_SOCKET = 107
"""Maximum length in bytes of a Unix socket's path, without the terminating zero."""
LONGEST_NAME = "/ray/session_2000-01-01_00-00-00_000000_{process}/sockets/plasma_store"
"""What Ray appends to the folder for its longest socket path; it contains the driver's process id."""
LARGEST_PROCESS = 4_194_303
"""The largest process id on Linux: a folder that leaves room for it always works."""


def check_temporary_folder() -> None:
    """Raises RequestError if Ray could not create its sockets in the temporary folder."""
    variable = next((name for name in VARIABLES if name in os.environ), None)
    folder = os.environ[variable] if variable else DEFAULT
    setting, fix = variable or "the temporary folder", f"run `export RAY_TMPDIR={DEFAULT}`"
    if not os.path.isabs(folder):
        raise RequestError(f"{setting}: got {folder!r}, but Ray needs an absolute path here; {fix}")
    length = len(os.fsencode(folder.rstrip("/")))
    if length + _bytes_added(os.getpid()) > LONGEST_SOCKET:
        raise RequestError(
            f"{setting}: the path {folder} has {length} bytes, but can have at most {LONGEST_SOCKET - _bytes_added()}, "
            f"because Ray keeps its sockets there and the path of a socket can have at most {LONGEST_SOCKET}; {fix}"
        )
    problem = _problem(Path(folder, "ray"))
    if problem:
        fix = "set RAY_TMPDIR to another folder" if folder.rstrip("/") == DEFAULT else fix
        raise RequestError(f"{setting}: Ray keeps its sockets under {folder}, but {problem}; {fix}")


def _bytes_added(process: int = LARGEST_PROCESS) -> int:
    return len(LONGEST_NAME.format(process=process))


def _problem(folder: Path) -> str | None:
    """Why the folder cannot be used, or created if it does not exist yet; None if it can."""
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not existing.is_dir():
        return f"{existing} is not a folder"
    if not os.access(existing, os.W_OK | os.X_OK):
        return f"{existing} cannot be written"
    return None

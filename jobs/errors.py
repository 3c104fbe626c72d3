"""The errors that end a command.

In: what went wrong. Out: exit status 2 for an invalid request, 1 for work that failed; the message is for the user.
"""

from __future__ import annotations

import errno
import re
from pathlib import Path

DISK_ERRORS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system has become read-only",
    errno.EIO: "the disk cannot be read or written",
}
"""Errors, by errno, that would hit every other trial or cell too."""


class RequestError(ValueError):
    """The request was invalid: one sentence says what was given, where, and what is allowed. Exit status 2."""


class DamagedFileError(RequestError):
    """A file is not as its sweep wrote it. The sweep's own command rebuilds it; every other command stops."""

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(
            f"{path} {why}: the file is damaged or was edited by hand; run `deltascope sweep` again to rebuild it"
        )
        self.path, self.why = path, why

    def __reduce__(self) -> tuple:
        return (DamagedFileError, (self.path, self.why))


class WorkFailed(RuntimeError):
    """Some trials or cells failed; the message names them. Exit status 1."""


def disk_errno(error: BaseException) -> int | None:
    """The errno of a `DISK_ERRORS` error, also if a library passes it on as text; None for any other error."""
    number = getattr(error, "errno", None)
    if number is None and (match := re.search(r"\(os error (\d+)\)|\[Errno (\d+)\]", str(error))):
        number = int(match[1] or match[2])
    return number if number in DISK_ERRORS else None


def first_line(error: Exception) -> str:
    """The first line of an exception's message, to quote in a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def public_line(error: Exception) -> str:
    """`first_line` without secrets, cut to 200 characters."""
    return without_secrets(first_line(error))[:200]


_CREDENTIALS = re.compile(r"(?<=://)\S*@")
_QUERY = re.compile(r"(://[^\s?]*)\?\S*")


def without_secrets(text: str) -> str:
    """`text` with `user:password@` and `?...` removed from every URL in it."""
    return _QUERY.sub(r"\1", _CREDENTIALS.sub("", text))

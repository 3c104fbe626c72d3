"""Keeps libraries from installing packages.

In: nothing. Out: `forbid_installs` makes this process refuse to start a package installer from now on;
`nothing_installed` does so inside its `with`. TransformerLens, for example, would run `pip install torchvision` for a
model with images, and replace the user's build of torch.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INSTALLERS = {"pip", "uv", "conda", "mamba", "micromamba", "easy_install", "poetry", "pdm", "pixi"}
VERBS = {"install", "add", "sync", "update", "upgrade"}
_STARTS = {"subprocess.Popen": 1, "os.posix_spawn": 1, "os.exec": 1, "os.spawn": 2, "os.system": 0}
"""Audit events of starting a program, and which of their arguments is the command."""
_depth = 0
_hooked = False


class InstallRefused(PermissionError):
    """A library tried to install a package."""


def forbid_installs() -> None:
    """Forbids installs in this process from now on. Safe to call repeatedly."""
    global _depth
    _hook()
    _depth += 1


@contextmanager
def nothing_installed() -> Iterator[None]:
    """Forbids installs inside the `with`, for processes that are not only ours, such as a notebook's."""
    global _depth
    _hook()
    _depth += 1
    try:
        yield
    finally:
        _depth -= 1


def installs(command: Any) -> bool:
    """Whether a command (a list of words, or a line for the shell) starts a package installer.

    >>> installs(["python", "-m", "pip", "install", "torchvision"]), installs("uv pip install x")
    (True, True)
    >>> installs(["pip", "list"])
    False
    """
    if isinstance(command, bytes | str):
        line = os.fsdecode(command)
        try:
            words = shlex.split(line)
        except ValueError:
            words = line.split()
    else:
        words = [os.fsdecode(word) for word in command or ()]
    for index, word in enumerate(words):
        name = os.path.basename(word).rstrip("0123456789.")
        if " " in word and installs(word):  # a line for a shell: sh -c "pip install ..."
            return True
        if name in INSTALLERS and not VERBS.isdisjoint(words[index + 1 :]):
            return True
    return False


def _hook() -> None:
    global _hooked
    if not _hooked:
        sys.addaudithook(_refuse)  # cannot be removed, so it is added only once
        _hooked = True


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if _depth and event in _STARTS and installs(arguments[_STARTS[event]]):
        raise InstallRefused(f"a library tried to install packages, which deltascope does not allow: {arguments[1:2]}")

"""Ends the driver when this machine's raylet (Ray's node manager) dies; Ray itself would leave it waiting forever.

In: how to find the raylet. Out: one sentence and exit status 1 within a second of its death. The driver and all its
children are killed; finished work is on disk, as after any kill.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Callable

import psutil

PERIOD_SECONDS = 0.25
NAME = "raylet"
PR_SET_CHILD_SUBREAPER = 36


class Watch:
    """A thread that waits for the raylet that `find` returns, from its first appearance until it dies or `end` is
    called."""

    def __init__(self, find: Callable[[], psutil.Process | None]) -> None:
        self._find, self._raylet = find, find()
        self._ended = threading.Event()
        # A dead raylet's workers keep writing for half a minute; as children of the driver they can be killed.
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        threading.Thread(target=self._wait, name=NAME, daemon=True).start()
        atexit.register(self.end)  # runs before Ray's own shutdown, which was registered earlier

    def end(self) -> None:
        """Stops watching: Ray is about to be shut down on purpose."""
        self._ended.set()
        atexit.unregister(self.end)

    def _wait(self) -> None:
        while self._raylet is None:
            if self._ended.wait(PERIOD_SECONDS):
                return
            self._raylet = self._find()
        while not _ends(self._raylet) and not self._ended.is_set():
            pass
        if not self._ended.is_set():
            _end_driver()


def child() -> psutil.Process | None:
    """The raylet that this process started; ignores a dead one from an earlier start."""
    with contextlib.suppress(psutil.NoSuchProcess):  # a child that ends while we look at it
        for process in psutil.Process().children():
            if process.name() == NAME and process.status() != psutil.STATUS_ZOMBIE:
                return process
    return None


def at(socket: str) -> psutil.Process | None:
    """The raylet of this machine that listens on `socket`."""
    option = f"--raylet_socket_name={socket}"
    processes = psutil.process_iter(["cmdline"])
    return next((process for process in processes if option in (process.info["cmdline"] or ())), None)


def _ends(process: psutil.Process) -> bool:
    """Whether it ends within one period; a zombie counts as ended."""
    try:
        process.wait(PERIOD_SECONDS)
    except psutil.TimeoutExpired:
        with contextlib.suppress(psutil.NoSuchProcess):
            return process.status() == psutil.STATUS_ZOMBIE
    return True


def _end_driver() -> None:
    print("error: Ray's raylet has died; run the same command to continue from here", file=sys.stderr, flush=True)
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    os._exit(1)

"""Reads every file of a sweep and lists those that have changed since they were written.

In: a `Context`. Out: a line for each damaged file, and the number of files read; nothing is changed.
"""

from __future__ import annotations

import time
from pathlib import Path

from jobs.context.context import Context
from jobs.errors import RequestError, WorkFailed
from jobs.files import SEAL, Damage, damage
from jobs.progress import clock
from jobs.sweep.mending import cached_files, find
from jobs.sweep.stage_list import STAGES
from jobs.sweep.stores import problems


def verify(context: Context) -> None:
    """Raises WorkFailed if something is damaged, RequestError if there is no sweep, or it is running."""
    space, started = context.space, time.monotonic()
    if not space.folder.is_dir():
        raise RequestError(f"there is no sweep {space.name} under {space.root}")
    with space.locked():
        files = [*cached_files(context), *(path for stage in STAGES for path in stage.files(context))]
        sizes = {path: path.stat().st_size for path in files}
        damaged = [Damage(*problem) for problem in problems(context).items()]
        if (context.model / SEAL).is_file():  # a base model built under the storage root
            damaged += damage(context.model)
        with context.progress.bar("verify", len(sizes), "files", sum(sizes.values()) or 1) as bar:

            def on_file(path: Path) -> None:
                if path in sizes:
                    bar.advance(1, sizes.pop(path) or 1)

            damaged += [broken for _, broken in find(context, on_file=on_file, caches=True)]
        for broken in damaged:
            relative = broken.path.relative_to(space.folder if broken.path.is_relative_to(space.folder) else space.root)
            context.progress.line(f"  {relative} {broken.why}")
    checked = f"{len(files)} files in {clock(time.monotonic() - started)}"
    if damaged:
        raise WorkFailed(
            f"{len(damaged)} of {space.name}'s files are damaged, missing, or not written by this sweep ({checked}); "
            "its `sweep` command moves such files to set_aside/ and rebuilds what is missing"
        )
    context.progress.line(f"all of {space.name} is as it was written: {checked}")

"""Files and folders that a reader sees whole or not at all.

In: the path to write. Out: a temporary path next to it, which is renamed to it when everything is written.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path next to `path`, for a file or a folder that the `with` block makes there.

    It is renamed to `path` if the block succeeds, and removed if not. An earlier file at `path` is replaced; an earlier
    folder that is not empty makes the renaming fail. The name is hidden and ends in `.tmp`; it holds no process id,
    because the nodes of a cluster may share the folder.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    except BaseException:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            with suppress(OSError):
                temporary.unlink()
        raise

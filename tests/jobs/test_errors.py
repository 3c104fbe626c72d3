"""An error of the disk is known for one however it is told."""

from __future__ import annotations

import errno

import pytest

from jobs.errors import disk_errno


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (RuntimeError("I/O error: No space left on device (os error 28)"), errno.ENOSPC),
        (RuntimeError("Worker failed: OSError: [Errno 28] No space left on device"), errno.ENOSPC),
        (RuntimeError("FileNotFoundError: [Errno 2] No such file or directory"), None),
        (RuntimeError("something else, 28 times"), None),
    ],
)
def test_a_disk_without_room_is_known(error: Exception, number: int | None) -> None:
    assert disk_errno(error) == number

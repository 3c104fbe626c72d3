"""The disk is full in the middle of each stage: one sentence, and the same command goes on once there is room."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import SMALL, wait_until
from tests.end_to_end.damage import tables
from tests.end_to_end.test_resume import start

SIZE = 300 * 2**20
BEGUN = {
    "data": "data",
    "lora": "lora/key.json",
    "transcoders": "activations/base/key.json",
    "deltas": "activations/finetuned/key.json",
    "evaluate": "cells/raw_*.json",
    "report": "cells/manifest.json",
}
"""What is there as soon as a stage works, or is about to."""


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own, in memory."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"file systems cannot be mounted here ({mounted.stderr.strip()})")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(disk: Path) -> Path:
    """Takes all the space that is left."""
    ballast = disk / "ballast"
    copying = ["dd", "if=/dev/zero", f"of={ballast}", "bs=64k", "status=none"]
    assert "No space left" in subprocess.run(copying, capture_output=True, text=True).stderr
    return ballast


@pytest.mark.timeout(1800)
def test_a_sweep_goes_on_once_there_is_room(seeds, disk: Path) -> None:
    arguments = ("sweep", "tiny", f"storage.root={disk}", *SMALL)
    sweep = disk / "sweeps/tiny"
    for stage, begun in BEGUN.items():
        process = start(*arguments)
        wait_until(lambda begun=begun: next(sweep.glob(begun), None) is not None, process)
        process.send_signal(signal.SIGSTOP)  # a short stage would end before the disk is full
        ballast = fill(disk)
        process.send_signal(signal.SIGCONT)
        _, errors = process.communicate(timeout=120)
        ballast.unlink()
        assert process.returncode == 1, f"{stage}: {process.returncode} {errors}"
        assert "Traceback" not in errors, f"{stage}: {errors}"
        assert re.search(r"No space left|disk is full", errors), f"{stage}: {errors}"
    process = start(*arguments)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert tables(sweep) == tables(seeds.root / "sweeps/tiny-s0")

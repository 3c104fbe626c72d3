"""Bases and deltas trained by two processes, each on its share of every batch, are those of one process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.end_to_end.conftest import REPOSITORY, environment
from tests.trainers.two_processes import main
from trainers.processes import Processes


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_are_the_batch(count: int) -> None:
    batch = torch.arange(20).view(10, 2)
    assert torch.equal(torch.cat([Processes(index, count).share(batch) for index in range(count)]), batch)


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    main(tmp_path, "cpu")
    two(tmp_path, "cpu")
    alone = load_file(tmp_path / "0_of_1.safetensors")
    first, second = (load_file(tmp_path / f"{index}_of_2.safetensors") for index in range(2))
    assert set(first) == set(second) == set(alone)
    for name, one in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(
            first[name], one, rtol=2e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}"
        )


def two(folder: Path, device: str) -> None:
    """Runs the same in two processes."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "tests.trainers.two_processes", str(folder), device],
        cwd=REPOSITORY,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr

"""Bases and deltas trained by two processes, each on its share of every batch, are those of one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.trainers.two_processes import check_two_are_one
from trainers.distributed import Processes


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shares_are_the_batch(count: int) -> None:
    batch = torch.arange(20).view(10, 2)
    assert torch.equal(torch.cat([Processes(index, count).share(batch) for index in range(count)]), batch)


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    check_two_are_one(tmp_path, "cpu")

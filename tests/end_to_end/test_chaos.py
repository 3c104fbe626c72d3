"""Four SIGKILLs at random moments, and a damaged file before each restart, change no table;
`python -m tests.end_to_end.chaos --kills 100` does more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.end_to_end.chaos import chaos, two_nodes
from tests.end_to_end.conftest import REPOSITORY

JOINED = """
import sys, time
from jobs.cluster import environment
environment.prepare(sys.argv[1])
from jobs.cluster import connection as cluster
cluster.connect(sys.argv[1])
print("joined", flush=True)
time.sleep(60)
"""


@pytest.mark.timeout(1800)
def test_four_kills_change_no_table(seeds, tmp_path: Path) -> None:
    assert "4 kills" in chaos(tmp_path, kills=4, seed=0, calm=seeds.root / "sweeps/tiny-s0", damage=True)


def test_a_driver_ends_when_its_cluster_node_dies(tmp_path: Path) -> None:
    with two_nodes(tmp_path) as nodes:
        driver = subprocess.Popen(
            [sys.executable, "-c", JOINED, nodes.address],
            cwd=REPOSITORY,
            env=nodes.variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert driver.stdout is not None
        assert driver.stdout.readline() == "joined\n"
        for one in nodes.family:
            if one.name() == "raylet":
                one.kill()
        _, errors = driver.communicate(timeout=50)
    assert driver.returncode == 1
    assert errors.splitlines()[-1] == "error: Ray's raylet has died; run the same command to continue from here"

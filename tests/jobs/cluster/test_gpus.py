"""Ray hands out GPUs as the settings say, tried with GPUs that a cluster pretends to have."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.jobs.cluster.pretended_gpus import GPUS


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """From its own process: the cluster of the other tests has no GPU."""
    command = [sys.executable, "-m", "tests.jobs.cluster.pretended_gpus", str(tmp_path_factory.mktemp("gpus"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("part", [1.0, 0.5])
@pytest.mark.parametrize("kind", ["tasks", "trials"])
def test_every_worker_sees_its_own_gpu_or_its_share_of_one(found: dict[str, Any], part: float, kind: str) -> None:
    seen = found[str(part)]
    assert seen["at_once"] == GPUS / part
    assert {one["device"] for one in seen[kind]} == {str(number) for number in range(GPUS)}
    for one in seen[kind]:
        beside = [
            other
            for other in seen[kind]
            if other["device"] == one["device"] and other["started"] < one["ended"] and one["started"] < other["ended"]
        ]
        assert len({other["process"] for other in beside}) <= 1 / part, "more on one GPU than fit"
        own = [other["device"] for other in seen[kind] if other["process"] == one["process"]]
        assert len(set(own)) == 1, "a worker stays on its GPU"

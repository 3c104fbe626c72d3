"""A cluster is joined only if it requires a token and every node sees the storage root: two nodes of a real cluster, in
their own process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobs.cluster.connection import check_closed
from jobs.errors import RequestError

SCRIPT = """
import os, sys
from pathlib import Path
from jobs.cluster import environment
environment.prepare()
import ray
from ray.cluster_utils import Cluster
from jobs.cluster.connection import check_storage
from jobs.errors import RequestError
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1)
ray.init(address=cluster.address, log_to_driver=False)
assert len(ray.nodes()) == 2
check_storage(Path(sys.argv[1]).resolve())
print("shared", os.listdir(sys.argv[1]))
os.chdir(sys.argv[1])  # a relative path now means a different folder on the nodes
try:
    check_storage(Path("elsewhere"))
except RequestError as error:
    print(error)
ray.shutdown()
cluster.shutdown()
"""


@pytest.mark.parametrize("address", ["127.0.0.1:6379", "localhost:6379"])
def test_loopback_needs_no_token(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    check_closed(address)


def test_a_cluster_that_others_reach_needs_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    check_closed("192.0.2.9:6379")
    monkeypatch.delenv("RAY_AUTH_MODE")
    with pytest.raises(RequestError, match=r"192\.0\.2\.9:6379 runs code for anyone who can reach it.*--insecure"):
        check_closed("192.0.2.9:6379")


def test_a_folder_that_nodes_do_not_share_is_named(tmp_path: Path) -> None:
    repository = Path(__file__).resolve().parents[3]
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "shared []" in done.stdout, "and nothing is left behind"
    assert "storage.root: node " in done.stdout
    assert "cannot read and write elsewhere; use a folder that all nodes share" in done.stdout

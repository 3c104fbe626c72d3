"""The web pages for a finished sweep: served on loopback, and showing the sweep."""

from __future__ import annotations

import json
import socket
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.end_to_end.conftest import Jobs, free_port, served


def fetch(url: str, body: dict | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers={"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.read().decode()


@pytest.mark.parametrize(
    ("options", "path", "body", "expected"),
    [
        ((), "/api/2.0/mlflow/experiments/search", {"max_results": 10}, '"tiny"'),
        (("--studies",), "/api/studies", None, "tiny/deltas/layer_01/p0.25/d004"),
    ],
    ids=["mlflow", "optuna"],
)
def test_the_page_shows_the_sweep(
    finished: tuple[Path, object], options: tuple[str, ...], path: str, body: dict | None, expected: str
) -> None:
    with served(finished[0], *options) as (address, process):
        assert expected in fetch(f"{address}{path}", body)
        listening = [
            one.laddr.ip
            for child in psutil.Process(process.pid).children(recursive=True)
            for one in child.net_connections()
            if one.status == psutil.CONN_LISTEN and address.endswith(f":{one.laddr.port}")
        ]
        assert set(listening) == {"127.0.0.1"}


def test_a_port_in_use_and_a_missing_store_are_sentences(jobs: Jobs, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = jobs("ui", "--root", str(tmp_path), "--port", port)
    assert (done.returncode, f"--port: {port} is in use" in done.stderr) == (2, True)
    done = jobs("ui", "--root", str(tmp_path), "--port", str(free_port()))
    assert (done.returncode, "run a sweep first" in done.stderr) == (2, True)

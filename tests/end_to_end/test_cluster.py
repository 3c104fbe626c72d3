"""A submitted job on a separate Ray cluster, with token authentication."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.end_to_end.conftest import REPOSITORY, SMALLEST, environment, free_port

TOKEN = "a" * 64
RAY = str(Path(sys.executable).with_name("ray"))


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """`ray start --head` on loopback with its own token; yields the environment to reach it."""
    with tempfile.TemporaryDirectory(prefix="ray") as session:  # its sockets need a short path
        dashboard = free_port()
        home = tmp_path / "home"
        home.mkdir()
        token = tmp_path / "token"
        token.write_text(TOKEN)
        token.chmod(0o600)
        variables = {
            **environment(),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_TMPDIR": session,
            "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
            "HOME": str(home),
        }
        start = [
            RAY, "start", "--head", "--block", f"--port={free_port()}", "--node-ip-address=127.0.0.1",
            "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", "--num-cpus=2", "--disable-usage-stats",
            f"--dashboard-agent-listen-port={free_port()}",
            "--object-store-memory=200000000",
        ]  # fmt: skip
        with (tmp_path / "head.log").open("w") as log:
            process = subprocess.Popen(start, env=variables, stdout=log, stderr=log)
            try:
                wait_for_job_agent(process, variables, tmp_path / "head.log")
                yield variables
            finally:
                everything = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
                for one in everything:
                    one.kill()
                psutil.wait_procs(everything, timeout=30)


def wait_for_job_agent(process: subprocess.Popen, variables: dict[str, str], log: Path) -> None:
    deadline = time.monotonic() + 120
    while problem := refused(variables["RAY_API_SERVER_ADDRESS"]):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text() + problem
        time.sleep(0.5)


def refused(server: str) -> str | None:
    """Why the server does not take a job, or None."""
    body = json.dumps({"entrypoint": "true"}).encode()
    headers = {"Authorization": f"Bearer {TOKEN}", "Content-Type": "application/json"}
    try:
        urllib.request.urlopen(urllib.request.Request(f"{server}/api/jobs/", body, headers), timeout=20).close()
    except OSError as error:
        return str(error)
    return None


def test_jobs_on_a_cluster(head: dict[str, str], tmp_path: Path) -> None:
    _a_submitted_job_runs_the_study(head)
    _a_command_from_outside_runs_there(head, tmp_path)


def _a_submitted_job_runs_the_study(head: dict[str, str]) -> None:
    submit = [
        RAY, "job", "submit", "--working-dir", ".", "--", "python", "-m", "jobs", "sweep", "search_spaces/tiny.yaml",
        *SMALLEST,
    ]  # fmt: skip
    done = subprocess.run(submit, cwd=REPOSITORY, env=head, capture_output=True, text=True, timeout=1200, check=False)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "succeeded" in printed
    assert "which the variable RAY_ADDRESS names" in printed, "Ray sets it for a job"
    # The upload is deleted with the job, so a relative storage root goes to the home folder.
    report = Path(head["HOME"]) / "deltascope/mlruns/sweeps/tiny/report/report.html"
    assert str(report) in printed
    assert report.is_file()
    packages = list(Path(head["RAY_TMPDIR"]).rglob("working_dir_files/_ray_pkg_*"))
    folders = [path for path in packages if path.is_dir()]
    assert folders
    assert not any((folder / name).exists() for folder in folders for name in (".venv", ".git", "mlruns/mlflow.db"))


def _a_command_from_outside_runs_there(head: dict[str, str], root: Path) -> None:
    """Its output and exit status come back, and Ctrl-C reaches it; the results are in a shared folder."""
    command = [sys.executable, "-m", "jobs", "lora", "tiny", f"storage.root={root}", *SMALLEST]
    asked = [*command, "--address", "ray://127.0.0.1:10001"]
    options: dict[str, Any] = {"cwd": REPOSITORY, "env": head, "text": True}
    said = root / "stopped.log"
    with said.open("w") as log:
        process = subprocess.Popen([*asked, "lora.steps=4000"], stdout=log, stderr=log, **options)
        try:
            deadline = time.monotonic() + 200
            while "LoRA study" not in said.read_text():
                assert process.poll() is None, said.read_text()
                assert time.monotonic() < deadline, said.read_text()
                time.sleep(0.5)
            process.send_signal(signal.SIGINT)
            assert process.wait(150) == 130, said.read_text()
        finally:
            process.kill()
    # Once from the job, which has cleaned up, and once from here.
    assert said.read_text().count("stopped; run the same command to continue from here") == 2, said.read_text()
    done = subprocess.run(asked, capture_output=True, timeout=300, check=False, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[2/2] lora" in done.stdout
    assert (root / "sweeps/tiny/lora/best.json").is_file()


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (["tiny"], "no Ray cluster answers"),
        (["{outside}"], "must be under"),
        (["tiny", "storage.optuna_url=postgresql://me:secret@host/studies"], "without a password"),
    ],
)
def test_a_wrong_request_from_outside_is_one_sentence(tmp_path: Path, request_: list[str], sentence: str) -> None:
    outside = tmp_path / "mine.yaml"
    outside.write_text((REPOSITORY / "search_spaces/tiny.yaml").read_text())
    command = [sys.executable, "-m", "jobs", "sweep", *(one.format(outside=outside) for one in request_)]
    done = subprocess.run(
        [*command, "--address", "ray://127.0.0.1:1"],
        cwd=REPOSITORY,
        env={**environment(), "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2
    assert sentence in done.stderr
    assert "secret" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr

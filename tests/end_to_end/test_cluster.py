"""A submitted job on a Ray cluster that stands on its own, with token authentication."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.conftest import REPOSITORY, SMALL, environment

RAY = str(Path(sys.executable).with_name("ray"))
DASHBOARD = 8299
PORT = 6399


@pytest.fixture
def head(tmp_path: Path) -> Iterator[dict[str, str]]:
    """`ray start --head` on loopback with a token of its own; yields the environment to reach it."""
    token = tmp_path / "token"
    variables = {
        **environment(),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_TMPDIR": str(tmp_path),
        "HOME": str(tmp_path / "home"),
    }
    (tmp_path / "home").mkdir()
    token.write_text("a" * 64)
    token.chmod(0o600)
    start = [
        RAY, "start", "--head", f"--port={PORT}", "--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1",
        f"--dashboard-port={DASHBOARD}", "--num-cpus=2", "--disable-usage-stats", "--object-store-memory=200000000",
    ]  # fmt: skip
    started = subprocess.run(start, env=variables, capture_output=True, text=True, timeout=120, check=False)
    assert started.returncode == 0, started.stdout + started.stderr
    yield {**variables, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{DASHBOARD}"}
    subprocess.run([RAY, "stop", "--force"], env=variables, capture_output=True, timeout=120, check=False)


def test_a_submitted_job_runs_the_study(head: dict[str, str]) -> None:
    submit = [
        RAY, "job", "submit", "--working-dir", ".", "--", "python", "-m", "jobs", "sweep", "search_spaces/tiny.yaml",
        *SMALL,
    ]  # fmt: skip
    done = subprocess.run(submit, cwd=REPOSITORY, env=head, capture_output=True, text=True, timeout=500, check=False)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed
    assert "succeeded" in printed
    # The upload is deleted with the job, so a relative storage root lies in the home folder.
    report = Path(head["HOME"]) / "deltascope/mlruns/sweeps/tiny/report/report.html"
    assert str(report) in printed
    assert report.is_file()
    packages = list(Path(head["RAY_TMPDIR"]).rglob("working_dir_files/_ray_pkg_*"))
    folders = [path for path in packages if path.is_dir()]
    assert folders
    assert not any((folder / name).exists() for folder in folders for name in (".venv", ".git", "mlruns/mlflow.db"))

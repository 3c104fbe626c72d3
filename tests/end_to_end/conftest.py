"""Whole commands in processes of their own, as a user runs them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
Jobs = Callable[..., subprocess.CompletedProcess[str]]

SMALL = (
    "lora.trials=2",
    "lora.steps=4",
    "deltas.d_new=[4]",
    "deltas.percentiles=[0.25]",
    "transcoders.target_l0=[4]",
    "evaluate.alphas=[0.0, 1.0]",
)
"""The tiny preset with fewer groups, for tests that run it several times."""


def environment() -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "MLFLOW_", "TUNE_"))}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}


def run(*arguments: str, timeout: float = 400, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jobs", *arguments]
    settings = {"cwd": REPOSITORY, "env": environment(), "capture_output": True, "text": True} | options
    return subprocess.run(command, timeout=timeout, check=False, **settings)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def jobs() -> Jobs:
    return run


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """The tiny preset, run once from nothing: its storage root and what it printed."""
    root = tmp_path_factory.mktemp("finished")
    done = run("sweep", "tiny", f"storage.root={root}")
    assert done.returncode == 0, done.stdout + done.stderr
    return root, done


def read(path: Path) -> Any:
    return json.loads(path.read_text())

"""A driver is killed: the same command continues from the finished stages, trials and cells."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import optuna
import psutil
import pytest
from mlflow import MlflowClient
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tests.end_to_end.conftest import REPOSITORY, SMALL, Jobs, environment, wait_until


def start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "jobs", *arguments]
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def kill_when(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    """SIGKILL of the driver and everything it started, as when a machine goes down."""
    wait_until(reached, process)
    everything = [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]
    for pid in everything:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()


def test_a_killed_sweep_continues(jobs: Jobs, tmp_path: Path) -> None:
    arguments = ("sweep", "tiny", f"storage.root={tmp_path}", *SMALL)
    sweep = tmp_path / "sweeps" / "tiny"

    first = start(*arguments)
    wait_until((sweep / "data/manifest.json").is_file, first)
    second = jobs(*arguments, timeout=200)
    assert (second.returncode, "another process is running the sweep" in second.stderr) == (2, True)
    kill_when(first, lambda: next(sweep.glob("deltas/**/result.json"), None) is not None)
    finished = [
        *sweep.glob("lora/trial_*/result.json"),
        *sweep.glob("deltas/**/result.json"),
        *(path for path in sweep.glob("cells/*.json") if path.name != "manifest.json"),
    ]
    kept = {path: path.stat().st_mtime_ns for path in finished}
    assert len(kept) > 2, "the trials of LoRA, and what was waited for"

    done = jobs(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lora: done already" in done.stdout
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "a finished trial or cell was run again"
    assert len(list(sweep.glob("deltas/**/result.json"))) == 2 * 2 * 2  # targets x layers x trials

    client = MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("tiny").experiment_id], max_results=1000)
    keys = [run.data.tags["deltascope.key"] for run in runs]
    assert len(keys) == len(set(keys))
    assert "RUNNING" not in {run.info.status for run in runs}
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(tmp_path / "optuna" / "journal.log")))
    for name in optuna.get_all_study_names(storage):
        states = [trial.state for trial in optuna.load_study(study_name=name, storage=storage).trials]
        assert TrialState.RUNNING not in states


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupt_stops_cleanly_and_says_how_to_continue(tmp_path: Path, how: signal.Signals) -> None:
    command = [sys.executable, "-m", "jobs", "sweep", "tiny", f"storage.root={tmp_path}", *SMALL]
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "sweeps/tiny/lora/key.json").is_file():
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(3)
    process.send_signal(how)
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 130
    assert "run the same command to continue" in errors
    assert "Traceback" not in errors

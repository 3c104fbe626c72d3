"""A tracking server that goes down in the middle of a sweep: once for a while, then for good."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from jobs.cluster.environment import prepare
from jobs.tracking.writer import Record, Tracker
from tests.end_to_end.conftest import REPOSITORY, SMALL, MlflowServer, environment, together, wait_until

prepare()  # MLflow would wait for minutes


@pytest.fixture
def server(tmp_path: Path) -> Iterator[MlflowServer]:
    one = MlflowServer(f"sqlite:///{tmp_path / 'server.db'}", tmp_path / "server_artifacts")
    one.start()
    yield one
    one.kill()


def runs_at(uri: str) -> tuple[MlflowClient, list[Run]]:
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    return client, list(client.search_runs([experiment.experiment_id], max_results=1000))


def histories(uri: str) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Every run's metrics, point by point, by the run's key; fails if two runs share a key."""
    client, runs = runs_at(uri)
    found = {
        run.data.tags["deltascope.key"]: {
            name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
            for name in run.data.metrics
        }
        for run in runs
    }
    assert len(found) == len(runs), "two runs share a key"
    return found


def test_a_server_outage_loses_nothing(server: MlflowServer, tmp_path: Path) -> None:
    sweep = tmp_path / "sweeps" / "tiny"
    arguments = ("tiny", f"storage.root={tmp_path}", *SMALL)
    tracked = (*arguments, f"storage.tracking_uri={server.url}")
    process = subprocess.Popen(
        [sys.executable, "-m", "jobs", "sweep", *tracked],
        cwd=REPOSITORY,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        # Down while trials end, and back: what it missed arrives while the sweep continues.
        wait_until(lambda: any(sweep.glob("lora/trial_*/result.json")))
        server.kill()
        wait_until(lambda: (sweep / "lora/manifest.json").is_file())
        server.start()
        wait_until(lambda: sum("/trial_" in key for key in histories(server.url)) >= 2)
        assert process.poll() is None, "the sweep ended before the server was back"
        # Down for good, before the sweep ends.
        wait_until(lambda: (sweep / "cells/key.json").is_file() or any(sweep.glob("cells/*.json")))
        server.kill()
        output, _ = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert "MLflow is answering again" in output
    assert output.count("MLflow stopped answering") == 2
    assert "they are on disk, and `deltascope track` sends them" in output
    assert "report.html" in output

    server.start()
    elsewhere = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    send, send_there = ("track", *tracked), ("track", *arguments, f"storage.tracking_uri={elsewhere}")
    for sent in together(send, send, send_there):
        assert sent.returncode == 0, sent.stdout + sent.stderr
    assert {run.info.status for run in runs_at(server.url)[1]} <= {"FINISHED", "KILLED"}
    expected, found = histories(elsewhere), histories(server.url)
    assert set(found) == set(expected)
    for key, metrics in expected.items():
        assert set(found[key]) == set(metrics), key
        for name, points in metrics.items():
            assert [step for step, _ in found[key][name]] == [step for step, _ in points], (key, name)
    client, runs = runs_at(server.url)
    root = next(run for run in runs if run.info.run_name == "tiny")
    assert "report.html" in {entry.path for entry in client.list_artifacts(root.info.run_id)}


def test_a_server_that_hangs_delays_the_end_by_seconds_only(server: MlflowServer, tmp_path: Path) -> None:
    """It accepts connections and never answers: the worst kind of outage."""
    one = Tracker(server.url, "study", tmp_path)
    one.open("sweep", "study")
    one.finish()
    assert server.process is not None
    os.killpg(server.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    for number in range(100):
        one.record(Record(f"sweep/{number}", str(number), "sweep", params={}, metrics={"loss": 1.0}))
    assert time.monotonic() - began < 30, "100 times three seconds would be spent waiting"
    one.finish()
    assert one.lost
    assert time.monotonic() - began < 100

"""A machine is lost: another one continues from the bucket, with the same command."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import optuna
import pytest
from mlflow import MlflowClient
from moto.server import ThreadedMotoServer
from optuna.storages.journal import JournalFileBackend

from tests.end_to_end.conftest import SMALL, Jobs, environment, read, together


@pytest.fixture
def bucket() -> Iterator[dict[str, str]]:
    """An S3 server in this process; yields the environment for a sweep that uses it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    endpoint = f"http://{host}:{port}"
    s3 = fsspec.filesystem("s3", key="test", secret="test", endpoint_url=endpoint, skip_instance_cache=True)
    s3.mkdir("bucket")
    keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
    yield {**environment(), **keys, "AWS_ENDPOINT_URL": endpoint}
    server.stop()


def test_another_machine_continues(bucket: dict[str, str], jobs: Jobs, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    mirror = ("storage.mirror=s3://bucket/runs", *SMALL)
    done = jobs("deltas", "tiny", f"storage.root={first}", *mirror, env=bucket)
    assert done.returncode == 0, done.stdout + done.stderr
    trials = {
        path.relative_to(first): path.read_bytes() for path in (first / "sweeps/tiny").glob("*/**/trial_*/result.json")
    }
    assert len(trials) == 2 + 2 * 2 * 2  # of lora; targets x layers x trials
    shutil.rmtree(first)

    more = ("deltas.trials=3", f"storage.root={second}", *mirror)
    done, sent = together(("sweep", "tiny", *more), ("track", "tiny", *more), env=bucket)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fetching" in done.stdout
    for stage in ("data", "lora", "transcoders"):
        assert f"{stage}: done already" in done.stdout
    for path, content in trials.items():
        assert (second / path).read_bytes() == content, "a finished trial was run again"
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(second / "optuna" / "journal.log")))
    for group in (second / "sweeps/tiny/deltas").glob("layer_*/*/d*"):
        assert sorted(path.name for path in group.glob("trial_*")) == ["trial_0000", "trial_0001", "trial_0002"]
        place = str(group.relative_to(second / "sweeps/tiny"))
        study = next(name for name in optuna.get_all_study_names(storage) if name.startswith(f"tiny/{place}@"))
        assert len(optuna.load_study(study_name=study, storage=storage).trials) == 3

    assert sent.returncode == 0, sent.stdout + sent.stderr
    client = MlflowClient(f"sqlite:///{second / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    names = [run.info.run_name for run in client.search_runs([experiment.experiment_id], max_results=1000)]
    assert len(names) == len(set(names))
    assert {"lora", "trial_0000", "layer_01/p0.25/d004/trial_0002"} <= set(names)

    s3 = fsspec.filesystem("s3", key="test", secret="test", endpoint_url=bucket["AWS_ENDPOINT_URL"])
    s3.invalidate_cache()
    there = {path.removeprefix("bucket/runs/tiny/") for path in s3.find("bucket/runs/tiny")}
    assert {"report/report.html", "cells/manifest.json", "lora/merged/model.safetensors"} <= there
    assert not [name for name in there if name.startswith("activations/") or "/residual/" in name]
    assert read(second / "sweeps/tiny/report/manifest.json")["checks"]

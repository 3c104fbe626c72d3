"""The MLflow store: the tree, no duplicates, orphans, secrets."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs.addresses import without_secrets
from jobs.errors import RequestError
from jobs.tracking import KEY_TAG, Tracker


def tracker(root: Path) -> Tracker:
    return Tracker(f"sqlite:///{root / 'mlflow.db'}", "study", root / "artifacts")


def runs(root: Path):
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    return client, client.search_runs([client.get_experiment_by_name("study").experiment_id])


def record(one: Tracker) -> None:
    one.record(
        "deltas/trial_0000",
        "trial_0000",
        "deltas",
        params={"lr": 0.1, "reason": None},
        metrics={"val_loss": 0.5, "name": "not a number", "bad": float("nan")},
        history=[{"step": 1, "val_loss": 0.9}, {"step": 2, "val_loss": 0.5}],
        seconds=3.0,
    )


def test_a_restart_re_attaches_and_duplicates_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        one = tracker(tmp_path)
        one.sweep_orphans()
        one.open("sweep", "study")
        one.open("deltas", "deltas", parent="sweep", params={"trials": 2})
        record(one)
        record(one)
    one.close("deltas", {"seconds": 1.0})
    one.close("sweep")
    client, found = runs(tmp_path)
    assert sorted(run.data.tags[KEY_TAG] for run in found) == ["deltas#", "deltas/trial_0000#", "sweep#"]
    assert {run.info.status for run in found} == {"FINISHED"}
    by_key = {run.data.tags[KEY_TAG]: run for run in found}
    trial = by_key["deltas/trial_0000#"]
    assert trial.data.tags["mlflow.parentRunId"] == by_key["deltas#"].info.run_id
    assert trial.data.params == {"lr": "0.1"}
    assert set(trial.data.metrics) == {"val_loss"}
    history = client.get_metric_history(trial.info.run_id, "val_loss")
    assert [(point.step, point.value) for point in history] == [(1, 0.9), (2, 0.5)]
    assert trial.info.end_time - trial.info.start_time == 3000


def test_a_dead_driver_leaves_no_run_running(tmp_path: Path) -> None:
    tracker(tmp_path).open("sweep", "study")
    tracker(tmp_path).sweep_orphans()
    assert {run.info.status for run in runs(tmp_path)[1]} == {"KILLED"}


def test_a_store_that_does_not_answer_is_a_sentence_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"storage\.tracking_uri: http://127\.0\.0\.1:9 ") as caught:
        Tracker("http://me:secret@127.0.0.1:9", "study", tmp_path)
    assert "secret" not in str(caught.value)


def test_a_store_that_goes_away_does_not_stop_the_sweep(tmp_path: Path) -> None:
    said: list[str] = []
    one = Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "study", tmp_path / "artifacts", say=said.append)
    one.open("sweep", "study")
    one.open("deltas", "deltas", parent="sweep")
    (tmp_path / "mlflow.db").rename(tmp_path / "away.db")
    (tmp_path / "mlflow.db").mkdir()
    record(one)
    record(one)
    one.close("deltas")
    assert len(said) == 1
    assert "MLflow stopped answering" in said[0]
    (tmp_path / "mlflow.db").rmdir()
    (tmp_path / "away.db").rename(tmp_path / "mlflow.db")
    again = tracker(tmp_path)
    again.sweep_orphans()
    again.open("deltas", "deltas", parent="sweep")
    record(again)
    again.close("deltas")
    _, found = runs(tmp_path)
    assert sorted(run.data.tags[KEY_TAG] for run in found) == ["deltas#", "deltas/trial_0000#", "sweep#"]
    assert "RUNNING" not in {run.info.status for run in found}


def test_a_start_from_nothing_has_runs_of_its_own(tmp_path: Path) -> None:
    for scope in ("first", "second"):
        one = Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "study", tmp_path / "artifacts", scope=scope)
        one.open("sweep", "study")
        one.close("sweep")
    assert sorted(run.data.tags[KEY_TAG] for run in runs(tmp_path)[1]) == ["sweep#first", "sweep#second"]


def test_addresses_are_shown_without_secrets() -> None:
    assert without_secrets("postgresql://u:p/w@ss@host/db?password=s3cret") == "postgresql://host/db"
    assert without_secrets("http://u:p@host/x failed, see http://y") == "http://host/x failed, see http://y"
    assert without_secrets("postgresql://me:pass@host/db") == "postgresql://host/db"
    assert without_secrets("sqlite:///a.db") == "sqlite:///a.db"

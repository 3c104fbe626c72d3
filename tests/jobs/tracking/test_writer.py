"""The MLflow store: the tree, no duplicates, orphans, secrets."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from jobs.errors import RequestError, without_secrets
from jobs.tracking.writer import KEY_TAG, Record, Tracker


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store as MLflow makes it, which takes seconds of migrations."""
    root = tmp_path_factory.mktemp("made")
    MlflowClient(f"sqlite:///{root / 'mlflow.db'}").search_experiments()
    return root / "mlflow.db"


@pytest.fixture(autouse=True)
def _store(made: Path, tmp_path: Path) -> None:
    """An empty one for each test."""
    shutil.copy(made, tmp_path / "mlflow.db")


def tracker(root: Path, said: list[str] | None = None) -> Tracker:
    say = (lambda text: None) if said is None else said.append
    return Tracker(f"sqlite:///{root / 'mlflow.db'}", "study", root / "artifacts", say=say)


def runs(root: Path) -> tuple[MlflowClient, list[Run]]:
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("study")
    assert experiment is not None
    return client, list(client.search_runs([experiment.experiment_id]))


def record(one: Tracker) -> None:
    one.record(
        Record(
            "deltas/trial_0000",
            "trial_0000",
            "deltas",
            params={"lr": 0.1, "reason": None},
            metrics={"val_loss": 0.5, "name": "not a number", "bad": float("nan")},
            history=[{"step": 1, "val_loss": 0.9}, {"step": 2, "val_loss": 0.5}],
            seconds=3.0,
        )
    )


def test_a_restart_re_attaches_and_duplicates_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        one = tracker(tmp_path)
        one.close_orphans()
        one.open("sweep", "study")
        one.open("deltas", "deltas", parent="sweep", params={"trials": 2})
        record(one)
        record(one)
        one.finish()
    one.close("deltas", {"seconds": 1.0})
    one.close("sweep")
    one.finish()
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


def test_the_best_value_does_not_replace_the_last_point_of_a_curve(tmp_path: Path) -> None:
    one = tracker(tmp_path)
    one.open("sweep", "study")
    one.open("deltas", "deltas", parent="sweep")
    history = [{"step": step, "val_loss": value} for step, value in ((1, 1.0), (2, 0.8), (3, 1.2))]
    metrics = {"val_loss": 0.8, "val_l0": 4.0}
    one.record(
        Record("deltas/trial_0000", "trial_0000", "deltas", params={}, metrics=metrics, history=history, seconds=3.0)
    )
    one.finish()
    client, found = runs(tmp_path)
    (trial,) = [run for run in found if run.data.tags[KEY_TAG] == "deltas/trial_0000#"]
    points = client.get_metric_history(trial.info.run_id, "val_loss")
    assert sorted((point.step, point.value) for point in points) == [(1, 1.0), (2, 0.8), (3, 1.2), (4, 0.8)]
    assert trial.data.metrics == {"val_loss": 0.8, "val_l0": 4.0}


def test_a_changed_parameter_is_said(tmp_path: Path) -> None:
    said: list[str] = []
    for epochs in (4, 8):
        one = tracker(tmp_path, said)
        one.open("sweep", "study", params={"deltas.epochs": epochs})
        one.finish()
    assert [line for line in said if "cannot change deltas.epochs of the run sweep from 4 to 8" in line]


def test_a_dead_driver_leaves_no_run_running(tmp_path: Path) -> None:
    for call in (lambda one: one.open("sweep", "study"), lambda one: one.close_orphans()):
        one = tracker(tmp_path)
        call(one)
        one.finish()
    assert {run.info.status for run in runs(tmp_path)[1]} == {"KILLED"}


def test_a_store_that_does_not_answer_is_a_sentence_without_its_password(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"storage\.tracking_uri: http://127\.0\.0\.1:9 ") as caught:
        Tracker("http://me:secret@127.0.0.1:9", "study", tmp_path)
    assert "secret" not in str(caught.value)


def away(root: Path) -> None:
    (root / "mlflow.db").rename(root / "away.db")
    (root / "mlflow.db").mkdir()


def back(root: Path) -> None:
    (root / "mlflow.db").rmdir()
    (root / "away.db").rename(root / "mlflow.db")


@pytest.fixture
def interrupted(tmp_path: Path) -> tuple[Tracker, list[str]]:
    """A tracker whose store went down after the stage's run was opened, and what it says."""
    said: list[str] = []
    one = Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "study", tmp_path / "artifacts", say=said.append)
    one.open("sweep", "study")
    one.open("deltas", "deltas", parent="sweep", params={"trials": 2})
    one.finish()
    away(tmp_path)
    began = time.monotonic()
    record(one)
    one.close("deltas", {"seconds": 1.0})
    assert time.monotonic() - began < 1.9, "the sweep waited for the store"  # two seconds before it tries again
    return one, said


def check_complete(root: Path) -> None:
    client, found = runs(root)
    assert sorted(run.data.tags[KEY_TAG] for run in found) == ["deltas#", "deltas/trial_0000#", "sweep#"]
    by_key = {run.data.tags[KEY_TAG]: run for run in found}
    assert by_key["deltas#"].info.status == by_key["deltas/trial_0000#"].info.status == "FINISHED"
    for key, count in (("deltas#", {"seconds": 1}), ("deltas/trial_0000#", {"val_loss": 2})):
        run = by_key[key]
        assert {name: len(client.get_metric_history(run.info.run_id, name)) for name in run.data.metrics} == count


def test_a_store_that_comes_back_gets_what_it_missed(tmp_path: Path, interrupted: tuple[Tracker, list[str]]) -> None:
    one, said = interrupted
    time.sleep(1)
    back(tmp_path)
    one.finish()
    assert [text.split("(")[0].strip() for text in said] == [
        "MLflow stopped answering",
        "MLflow is answering again; sending what it missed",
    ]
    assert not one.lost
    check_complete(tmp_path)


def test_a_store_that_stays_down_is_reported_once_and_gets_it_later(
    tmp_path: Path, interrupted: tuple[Tracker, list[str]]
) -> None:
    one, said = interrupted
    began = time.monotonic()
    one.finish()
    assert time.monotonic() - began < 60, "it waits until the store is back"
    assert one.lost
    assert len(said) == 1
    back(tmp_path)
    again = tracker(tmp_path)
    again.close_orphans()
    again.open("deltas", "deltas", parent="sweep")
    record(again)
    again.close("deltas", {"seconds": 1.0})
    again.finish()
    check_complete(tmp_path)


def test_an_interrupted_call_is_repeated_without_a_trace(tmp_path: Path) -> None:
    """The driver died after creating a stage's run with nothing in it, and a trial's metrics but not its end."""
    one = tracker(tmp_path)
    one.open("sweep", "study")
    one.open("deltas", "deltas", parent="sweep")
    record(one)
    one.log("deltas", {"seconds": 1.0})
    one.finish()
    client, found = runs(tmp_path)
    trial = next(run for run in found if "trial" in run.data.tags[KEY_TAG])
    client.update_run(trial.info.run_id, status="RUNNING")
    again = tracker(tmp_path)
    again.close_orphans()
    again.open("deltas", "deltas", parent="sweep", params={"trials": 2})
    record(again)
    again.close("deltas", {"seconds": 1.0})
    again.open("deltas", "deltas", parent="sweep", params={"trials": 3})
    again.close("deltas")
    again.finish()
    assert again.refused == 0
    check_complete(tmp_path)
    stage = next(run for run in runs(tmp_path)[1] if run.data.tags[KEY_TAG] == "deltas#")
    assert stage.data.params == {"trials": "2"}, "the parameters of the first start"


def test_a_rejected_call_does_not_hold_up_the_others(tmp_path: Path) -> None:
    said: list[str] = []
    one = Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "study", tmp_path / "artifacts", say=said.append)
    one.open("sweep", "study")
    one.log("sweep", {"not a name?": 1.0})
    one.close("sweep")
    one.finish()
    assert (one.refused, one.lost, len(said)) == (1, False, 1)
    assert {run.info.status for run in runs(tmp_path)[1]} == {"FINISHED"}


def test_a_fresh_start_has_its_own_runs(tmp_path: Path) -> None:
    for scope in ("first", "second"):
        one = Tracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "study", tmp_path / "artifacts", scope=scope)
        one.open("sweep", "study")
        one.close("sweep")
        one.finish()
    assert sorted(run.data.tags[KEY_TAG] for run in runs(tmp_path)[1]) == ["sweep#first", "sweep#second"]


def test_addresses_are_shown_without_secrets() -> None:
    assert without_secrets("postgresql://u:p/w@ss@host/db?password=s3cret") == "postgresql://host/db"
    assert without_secrets("http://u:p@host/x failed, see http://y") == "http://host/x failed, see http://y"
    assert without_secrets("postgresql://me:pass@host/db") == "postgresql://host/db"
    assert without_secrets("sqlite:///a.db") == "sqlite:///a.db"

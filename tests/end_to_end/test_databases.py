"""What a team shares: Optuna's studies in PostgreSQL, and an MLflow server on another database of it."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from jobs.search.databases import open_database
from tests.end_to_end.conftest import SMALLEST, Jobs, MlflowServer, environment, free_port, read, together
from tests.end_to_end.postgres import PASSWORD, USER, Postgres, running

STUDIES, TRACKING = "studies", "tracking"
SOME = (*SMALLEST, "deltas.trials=2")


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    with running([STUDIES, TRACKING]) as server:
        yield server


@pytest.fixture
def tracking(postgres: Postgres, tmp_path: Path) -> Iterator[str]:
    """The address of an `mlflow server` on the other database."""
    server = MlflowServer(postgres.url(TRACKING), tmp_path / "artifacts")
    server.start()
    yield server.url
    server.kill()


def test_a_sweep_with_a_database_and_a_tracking_server(
    postgres: Postgres, tracking: str, jobs: Jobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "runs"
    with tempfile.TemporaryDirectory(prefix="ray") as session:  # its sockets need a short path
        stores = (f"storage.optuna_url={postgres.url(STUDIES)}", f"storage.tracking_uri={tracking}")
        asked = ("sweep", "tiny", f"storage.root={root}", *stores, *SOME)
        variables = {**environment(), "RAY_TMPDIR": session}
        done = jobs(*asked, env=variables, timeout=1200)
        assert done.returncode == 0, done.stdout + done.stderr
        again = jobs(*asked, env=variables, timeout=1200)
        assert again.returncode == 0, again.stdout + again.stderr
        assert "everything is done already" in again.stdout
        assert "[1/" not in again.stdout

        trials = sorted(
            str(path.parent.relative_to(root / "sweeps/tiny")) for path in root.rglob("trial_*/result.json")
        )
        assert len(trials) == 3
        _the_studies_are_in_the_database(postgres, root, trials)
        _the_runs_are_on_the_server(MlflowClient(tracking), root, trials)
        assert postgres.rows(TRACKING, "SELECT count(*) FROM runs") >= [(len(trials),)]
        assert not list(root.rglob("journal.log"))
        assert not list(root.rglob("mlflow.db"))

        secret = PASSWORD.encode()
        assert PASSWORD not in done.stdout + done.stderr + again.stdout + again.stderr
        files = [path for folder in (root, Path(session)) for path in folder.rglob("*") if path.is_file()]
        assert [path for path in files if secret in path.read_bytes()] == []
        assert "127.0.0.1" in (root / "sweeps/tiny/sweep.yaml").read_text(), "the address itself is kept"
        _a_database_that_cannot_be_used_is_named(postgres, tmp_path)
        monkeypatch.setenv("PGPASSWORD", PASSWORD)  # so that no one reads it in a command's arguments
        assert open_database(f"postgresql://{USER}@127.0.0.1:{postgres.port}/{STUDIES}").get_all_studies()


def _the_studies_are_in_the_database(postgres: Postgres, root: Path, trials: list[str]) -> None:
    """As many trials as there are result files in each study, with the values of the files."""
    query = """
        SELECT studies.study_name, trials.number, trials.state::text, trial_values.value
        FROM studies JOIN trials USING (study_id) JOIN trial_values USING (trial_id)"""
    found = {}
    for study, number, state, value in postgres.rows(STUDIES, query):
        place = study.removeprefix("tiny/").partition("@")[0]
        found[f"{place}/trial_{number:04d}"] = (state, value)
    results = {trial: read(root / "sweeps/tiny" / trial / "result.json") for trial in trials}
    assert found == {trial: (one["state"], pytest.approx(one["value"])) for trial, one in results.items()}


def _the_runs_are_on_the_server(client: MlflowClient, root: Path, trials: list[str]) -> None:
    """A tree, sweep -> stage -> trial or cell, in which every trial has its loss."""
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id], max_results=1000)}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    parents = {key: runs.get(run.data.tags.get("mlflow.parentRunId", "")) for key, run in runs.items()}
    (top,) = [run for key, run in runs.items() if parents[key] is None]
    stages = {run.info.run_name for key, run in runs.items() if parents[key] is top}
    assert stages == {"data", "lora", "transcoders", "deltas", "evaluate", "report"}
    ran = {key: run for key, run in runs.items() if "trial_" in run.info.run_name}
    assert Counter(parents[key].info.run_name for key in ran) == Counter(trial.split("/")[0] for trial in trials)
    losses = sorted(run.data.metrics["val_loss"] for run in ran.values())
    expected = sorted(read(root / "sweeps/tiny" / trial / "result.json")["value"] for trial in trials)
    assert losses == pytest.approx(expected)


def _a_database_that_cannot_be_used_is_named(postgres: Postgres, folder: Path) -> None:
    """One sentence before any work, without user and password."""
    urls = {
        postgres.url(STUDIES, password="wr0ng-one"): "authentication failed",
        postgres.url(STUDIES, user="nobody-known"): "authentication failed",
        postgres.url("elsewhere"): "does not exist",
        Postgres(free_port()).url(STUDIES): "refused",
    }
    roots = [folder / f"refused_{number}" for number in range(len(urls))]
    asked = [
        ("sweep", "tiny", f"storage.root={root}", f"storage.optuna_url={url}")
        for root, url in zip(roots, urls, strict=True)
    ]
    for root, done, why in zip(roots, together(*asked), urls.values(), strict=True):
        assert done.returncode == 2, done.stdout + done.stderr
        (line,) = done.stderr.strip().splitlines()
        assert line.startswith("error: storage.optuna_url: postgresql://127.0.0.1:")
        assert why in line
        for secret in (PASSWORD, "wr0ng-one", "nobody-known", USER):
            assert secret not in line + done.stdout
        assert not root.exists()

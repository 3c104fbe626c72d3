"""What a store of MLflow gets from the results on disk is what the sweep itself sent to its own store."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run, ViewType

from jobs.context.context import Context
from jobs.files import MANIFEST, read_json, write_json
from jobs.sweep.backfill import distinguishing_params, report_results
from jobs.sweep.stage_list import NAMES
from jobs.sweep.stages.report import headlines
from jobs.tracking.writer import KEY_TAG
from search_spaces.load import load

NOT_READ = ("activations", "merged", "answered", "*.safetensors", "*.npz", ".lock", "timeline.jsonl")
"""Large files of a sweep that no run in MLflow is made of."""
KEPT_GROUPS = ("layer_01/p0.25/d004", "layer_02/change/d008")
"""Groups of deltas whose trials stay in the copied sweep; a few runs are enough, and each takes the store a while."""


class Stored(NamedTuple):
    """A run of MLflow without the ids and times that differ between stores. `metrics` maps each name to its history."""

    name: str
    status: str
    parent: str
    params: dict[str, str]
    metrics: dict[str, list[tuple[int, float]]]


def runs_of(store: Path) -> dict[str, Run]:
    """The runs of the sweep by key."""
    client = MlflowClient(f"sqlite:///{store}")
    experiment = client.get_experiment_by_name("tiny")
    assert experiment is not None
    runs = list(client.search_runs([experiment.experiment_id], max_results=5000))
    by_key = {run.data.tags[KEY_TAG].rpartition("#")[0]: run for run in runs}
    assert len(by_key) == len(runs), "no two runs have the same key"
    return by_key


def stored(store: Path, keys: set[str] | None = None) -> dict[str, Stored]:
    """The runs of a store as comparable values, all of them or those of the keys."""
    client, runs = MlflowClient(f"sqlite:///{store}"), runs_of(store)
    key_of_id = {run.info.run_id: key for key, run in runs.items()}
    return {
        key: Stored(
            run.data.tags["mlflow.runName"],
            run.info.status,
            key_of_id.get(run.data.tags.get("mlflow.parentRunId", ""), ""),
            run.data.params,
            {
                name: [(point.step, point.value) for point in client.get_metric_history(run.info.run_id, name)]
                for name in run.data.metrics
            },
        )
        for key, run in runs.items()
        if keys is None or key in keys
    }


def shorten(folder: Path) -> None:
    """Leaves the trials of some groups, and of each kind of cell the first."""
    for group in {path.parents[1] for path in folder.glob("deltas/layer_*/*/d*/trial_*/result.json")}:
        if str(group.relative_to(folder / "deltas")) not in KEPT_GROUPS:
            shutil.rmtree(group)
    manifest = read_json(folder / "cells" / MANIFEST)
    first: dict[str, str] = {}
    for name in manifest["cells"]:
        first.setdefault(read_json(folder / "cells" / f"{name}.json")["kind"], name)
    write_json(folder / "cells" / MANIFEST, manifest | {"cells": list(first.values())})


@pytest.fixture(scope="module")
def short(finished: tuple[Path, object], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storage root of a copy of the finished sweep with fewer results, and of an empty store."""
    root = tmp_path_factory.mktemp("short")
    shutil.copytree(finished[0] / "sweeps", root / "sweeps", ignore=shutil.ignore_patterns(*NOT_READ))
    shutil.copytree(finished[0] / "models", root / "models")
    shorten(root / "sweeps" / "tiny")
    MlflowClient(f"sqlite:///{root / 'mlflow.db'}").search_experiments()  # makes the tables, which takes seconds
    return root


@pytest.fixture
def root(short: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(short, tmp_path / "root"))


def send(root: Path) -> Context:
    """Sends what the store lacks, as a process of its own would."""
    context = Context(load("tiny", [f"storage.root={root}", f"storage.tracking_uri=sqlite:///{root / 'mlflow.db'}"]))
    report_results(context)
    assert (context.tracker.lost, context.tracker.refused) == (False, 0)
    return context


def results_in(folder: Path) -> set[str]:
    """The names of the trials, bases, polished deltas and cells that are on disk, with their stage."""
    trials = {f"lora/{path.parent.name}" for path in folder.glob("lora/trial_*/result.json")}
    trials |= {str(path.parent.relative_to(folder)) for path in folder.glob("deltas/layer_*/*/d*/trial_*/result.json")}
    polished = {str(path.parent.relative_to(folder)) for path in folder.glob(f"deltas/polished/d*/{MANIFEST}")}
    manifests = [read_json(path) for path in folder.glob(f"transcoders/layer_*/{MANIFEST}")]
    bases = {f"transcoders/{base['path']}" for manifest in manifests for base in manifest["bases"]}
    return trials | polished | bases | {f"evaluate/{name}" for name in read_json(folder / "cells" / MANIFEST)["cells"]}


def test_an_empty_store_gets_the_runs_that_the_sweep_sent(finished: tuple[Path, object], root: Path) -> None:
    context = send(root)
    sent = stored(root / "mlflow.db")
    assert {key.partition("@")[0] for key in sent if "/" in key} == results_in(context.space.folder)
    assert {key for key in sent if "/" not in key} == {"sweep", *NAMES}
    original = stored(finished[0] / "mlflow.db", set(sent))
    summary = {key: runs.pop("sweep") for key, runs in (("sent", sent), ("original", original))}
    assert sent == original
    # The figures of the sweep's own run are computed from the cells, of which the copy has fewer.
    assert {name: points[-1][1] for name, points in summary["sent"].metrics.items()} == headlines(context)
    assert summary["sent"]._replace(metrics={}) == summary["original"]._replace(metrics={})


def test_the_report_goes_with_it(root: Path) -> None:
    context = send(root)
    client, run = MlflowClient(f"sqlite:///{root / 'mlflow.db'}"), runs_of(root / "mlflow.db")["sweep"]
    artifacts = {entry.path for entry in client.list_artifacts(run.info.run_id)}
    assert artifacts == {"generations", *(path.name for path in context.space.report.iterdir())}
    texts = {Path(entry.path).name for entry in client.list_artifacts(run.info.run_id, "generations")}
    assert texts == {path.name for path in context.space.generations.iterdir()}


def test_a_second_time_nothing_is_added(root: Path) -> None:
    send(root)
    first, ids = stored(root / "mlflow.db"), {key: run.info.run_id for key, run in runs_of(root / "mlflow.db").items()}
    send(root)
    assert stored(root / "mlflow.db") == first
    assert {key: run.info.run_id for key, run in runs_of(root / "mlflow.db").items()} == ids


def a_trial_is_lost(client: MlflowClient, runs: dict[str, Run]) -> set[str]:
    key = next(key for key in runs if key.startswith("deltas/layer_"))
    client.delete_run(runs[key].info.run_id)
    return {key}


def a_cell_is_half_written(client: MlflowClient, runs: dict[str, Run]) -> set[str]:
    key = next(key for key in runs if key.startswith("evaluate/"))
    client.update_run(runs[key].info.run_id, status="RUNNING")
    return {key}


def a_stage_never_ended(client: MlflowClient, runs: dict[str, Run]) -> set[str]:
    client.update_run(runs["deltas"].info.run_id, status="RUNNING")
    return set()


@pytest.mark.parametrize("damage", [a_trial_is_lost, a_cell_is_half_written, a_stage_never_ended])
def test_only_what_is_missing_is_sent(root: Path, damage: Callable[[MlflowClient, dict[str, Run]], set[str]]) -> None:
    send(root)
    whole, before = stored(root / "mlflow.db"), runs_of(root / "mlflow.db")
    again = damage(MlflowClient(f"sqlite:///{root / 'mlflow.db'}"), before)
    send(root)
    assert stored(root / "mlflow.db") == whole
    after = runs_of(root / "mlflow.db")
    assert {key for key, run in after.items() if run.info.run_id != before[key].info.run_id} == again


def test_a_stage_that_is_not_finished_is_left_out(root: Path) -> None:
    folder = root / "sweeps" / "tiny"
    for stage in ("cells", "report"):
        (folder / stage / MANIFEST).unlink()
    send(root)
    found = runs_of(root / "mlflow.db")
    assert {"evaluate", "report"}.isdisjoint(found)
    assert {key.partition("/")[0] for key in found} == {"sweep", "data", "lora", "transcoders", "deltas"}
    assert found["sweep"].data.metrics == {}


def test_the_runs_of_an_earlier_start_are_left_alone(root: Path) -> None:
    """`--fresh` begins anew under the same name, with another id in start.json."""
    send(root)
    (root / "sweeps" / "tiny" / "start.json").unlink()
    send(root)
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment: Any = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id], run_view_type=ViewType.ALL, max_results=5000)
    keys = [run.data.tags[KEY_TAG].split("#") for run in runs]
    first, second = ({key for key, scope in keys if scope == start} for start in {scope for _, scope in keys})
    assert first == second
    assert len(keys) == 2 * len(first)


def test_adopted_models_are_told_apart_from_trained_ones() -> None:
    trained = load("tiny", ["seed=3"])
    assert distinguishing_params(trained)["seed"] == 3
    assert "model.finetuned" not in distinguishing_params(trained)
    adopted = trained.model_copy(update={"model": trained.model.model_copy(update={"finetuned": "somewhere"})})
    assert distinguishing_params(adopted) == distinguishing_params(trained) | {"model.finetuned": "somewhere"}

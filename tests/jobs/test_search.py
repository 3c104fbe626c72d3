"""The search over groups with real Tune and Optuna."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from jobs.cluster import Share
from jobs.progress import Progress
from jobs.search import EarlyStopping, Group, best_of, open_storage, run_search, trials_of
from search_spaces.schema import Choice, Range


def bowl(config: dict[str, Any], report: Any) -> dict[str, Any]:
    """Best at x = centre; far trials are visibly worse from the first validation."""
    loss = (config["x"] - config["centre"]) ** 2
    for step in range(1, 5):
        report({"step": step, "val_loss": loss + 1 / step})
    return {"step": 4, "val_loss": loss + 0.25}


def troubled(config: dict[str, Any], report: Any) -> dict[str, Any]:
    """Trial 0 diverges, trial 1 gives NaN, trial 2 kills its worker once, the others are well."""
    if config["trial"] == 0:
        return {"failed": "the loss is nan at step 1"}
    if config["trial"] == 1:
        return {"val_loss": math.nan, "step": 1}
    marker = Path(config["folder"]).parent / "died"
    if config["trial"] == 2 and not marker.exists():
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        os._exit(1)
    return {"val_loss": config["x"], "step": 1}


def group(root: Path, name: str, trials: int, centre: float = 0.3) -> Group:
    space = {"x": Range(low=0.0, high=1.0), "kind": Choice(choice=["a", "b"]), "fixed": 3}
    return Group(name, root / name, space, trials, seed=1, constants={"centre": centre}, study=f"test/{name}")


def search(root: Path, groups: list[Group], trial: Any, share: Share, halving: EarlyStopping | None = None) -> list:
    told: list[dict[str, Any]] = []
    with Progress().bar("trials", sum(one.trials for one in groups), "trials") as bar:
        run_search(
            groups,
            trial,
            storage=open_storage(None, root),
            share=share,
            max_retries=1,
            early_stopping=halving,
            scratch=root / ".tune",
            bar=bar,
            on_trial=lambda group, result: told.append(result),
        )
    return told


def states(root: Path, name: str) -> list[TrialState]:
    return [
        trial.state for trial in optuna.load_study(study_name=f"test/{name}", storage=open_storage(None, root)).trials
    ]


def test_groups_have_their_own_studies_and_early_stopping(share: Share, tmp_path: Path) -> None:
    groups = [group(tmp_path, "near", 6, 0.3), group(tmp_path, "far", 6, 100.0)]
    told = search(tmp_path, groups, bowl, share, EarlyStopping(grace=1, longest=4, reduction_factor=2))
    assert len(told) == 12
    for one in groups:
        results = trials_of(one)
        assert [result["trial"] for result in results] == list(range(6))
        assert {result["params"]["fixed"] for result in results} == {3}
        # Losses of the two groups differ by thousands: a shared bracket would stop all of `far`.
        best = best_of(results)
        assert best is not None
        assert [entry["step"] for entry in best["history"]] == [1, 2, 3, 4]
        stopped = [result for result in results if result["state"] == "STOPPED"]
        assert stopped
        assert all(len(result["history"]) < 4 for result in stopped)
        assert states(tmp_path, one.name).count(TrialState.PRUNED) == len(stopped)


def test_failures_are_told_with_their_reason_and_deaths_are_retried(share: Share, tmp_path: Path) -> None:
    one = group(tmp_path, "troubled", 4)
    search(tmp_path, [one], troubled, share)
    results = trials_of(one)
    assert [result["state"] for result in results] == ["FAILED", "FAILED", "COMPLETE", "COMPLETE"]
    assert results[0]["reason"] == "the loss is nan at step 1"
    assert "nan" in results[1]["reason"]
    # A failed trial is not a finished one: the next run puts others in their place.
    assert len(search(tmp_path, [one], troubled, share)) == 2
    assert [result["state"] for result in trials_of(one)][4:] == ["COMPLETE", "COMPLETE"]
    assert search(tmp_path, [one], troubled, share) == []
    assert states(tmp_path, "troubled")[:4] == [
        TrialState.FAIL,
        TrialState.FAIL,
        TrialState.COMPLETE,
        TrialState.COMPLETE,
    ]


def test_a_repeated_search_runs_what_is_missing(share: Share, tmp_path: Path) -> None:
    search(tmp_path, [group(tmp_path, "grown", 2)], bowl, share)
    before = [result["params"] for result in trials_of(group(tmp_path, "grown", 2))]
    assert search(tmp_path, [group(tmp_path, "grown", 2)], bowl, share) == []
    assert len(search(tmp_path, [group(tmp_path, "grown", 3)], bowl, share)) == 1
    after = [result["params"] for result in trials_of(group(tmp_path, "grown", 3))]
    assert after[:2] == before
    assert after[2] not in before


def test_fewer_trials_than_before_leave_other_groups_their_own(share: Share, tmp_path: Path) -> None:
    search(tmp_path, [group(tmp_path, "full", 3)], bowl, share)
    told = search(tmp_path, [group(tmp_path, "full", 1), group(tmp_path, "empty", 2)], bowl, share)
    assert [result["group"] for result in told] == ["empty", "empty"]


def test_a_zombie_of_a_dead_driver_is_asked_again(share: Share, tmp_path: Path) -> None:
    storage = open_storage(None, tmp_path)
    study = optuna.create_study(study_name="test/zombie", storage=storage)
    study.ask({"x": optuna.distributions.FloatDistribution(0.0, 1.0)})
    wanted = study.trials[0].params["x"]
    one = group(tmp_path, "zombie", 2)
    search(tmp_path, [one], bowl, share)
    assert TrialState.RUNNING not in states(tmp_path, "zombie")
    assert [result["trial"] for result in trials_of(one)] == [1, 2]
    assert trials_of(one)[0]["params"]["x"] == pytest.approx(wanted)


def test_whole_ranges_give_whole_numbers(share: Share, tmp_path: Path) -> None:
    one = Group("whole", tmp_path / "whole", {"x": Range(low=2, high=9)}, 3, 0, {"centre": 5}, "test/whole")
    search(tmp_path, [one], bowl, share)
    assert all(isinstance(result["params"]["x"], int) for result in trials_of(one))

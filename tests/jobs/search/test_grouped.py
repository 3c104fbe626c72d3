"""The search over groups with real Tune and Optuna."""

from __future__ import annotations

import errno
import math
import os
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from jobs.cluster.connection import Share
from jobs.progress import Progress
from jobs.search import grouped
from jobs.search.grouped import GroupedSearch, Runtime, run_search
from jobs.search.halving import EarlyStopping
from jobs.search.studies import Group, best_of, open_storage, pareto_front, trials_of
from search_spaces.dimensions import Choice, Range

Mixed = tuple[Path, dict[str, Group]]


def bowl(config: dict[str, Any], report: Any) -> dict[str, Any]:
    """Best at x = centre; trials far from it are clearly worse from the first validation. `fvu` and `l0` pull apart."""
    loss = (config["x"] - config["centre"]) ** 2
    for step in range(1, 5):
        report({"step": step, "val_loss": loss + 1 / step})
    return {"step": 4, "val_loss": loss + 0.25, "fvu": config["x"], "l0": 1 - config["x"] ** 2}


def troubled(config: dict[str, Any], report: Any) -> dict[str, Any]:
    """Trial 0 diverges, trial 1 gives NaN, trial 2 kills its worker once, the others are fine."""
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


def dying(config: dict[str, Any], report: Any) -> dict[str, Any]:
    """On a trial's first attempt its worker dies soon after the trial ends, so at any moment of being reused."""
    report({"step": 1, "val_loss": config["x"]})
    marker = Path(config["folder"]).parent / f"tried_{config['trial']}"
    if not marker.exists():
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        threading.Timer(config["trial"] * 0.002, os._exit, [1]).start()
    return {"step": 1, "val_loss": config["x"]}


def without_a_disk(config: dict[str, Any], report: Any) -> dict[str, Any]:
    if config["trial"] == 1:
        raise OSError(errno.EROFS, "Read-only file system")
    return bowl(config, report)


def group(root: Path, name: str, trials: int, centre: float = 0.3) -> Group:
    space = {"x": Range(low=0.0, high=1.0), "kind": Choice(choice=["a", "b"]), "fixed": 3}
    return Group(name, root / name, space, trials, seed=1, constants={"centre": centre}, study=f"test/{name}")


def search(
    root: Path,
    groups: list[Group],
    trial: Any,
    share: Share,
    halving: EarlyStopping | None = None,
    max_retries: int = 1,
    on_trial: Callable[[Group, dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []
    with Progress().bar("trials", sum(one.trials for one in groups), "trials") as bar:
        run_search(
            groups,
            trial,
            Runtime(open_storage(None, root), share, max_retries, root / ".tune"),
            early_stopping=halving,
            bar=bar,
            on_trial=on_trial or (lambda group, result: told.append(result)),
        )
    return told


def states(root: Path, name: str) -> list[TrialState]:
    return [
        trial.state for trial in optuna.load_study(study_name=f"test/{name}", storage=open_storage(None, root)).trials
    ]


def test_groups_have_their_own_studies_and_early_stopping(share: Share, tmp_path: Path) -> None:
    groups = [group(tmp_path, "near", 6, 0.3), group(tmp_path, "far", 6, 100.0)]
    told = search(tmp_path, groups, bowl, share, EarlyStopping(grace=1, longest=4, reduction_factor=3))
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


def test_reports_that_are_sent_together_are_those_sent_one_by_one(
    share: Share, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name, seconds in (("apart", 0.0), ("together", 60.0)):
        monkeypatch.setattr(grouped, "REPORT_SECONDS", seconds)
        one = group(tmp_path / name, "bowl", 2)
        search(tmp_path / name, [one], bowl, share)
        study = optuna.load_study(study_name="test/bowl", storage=open_storage(None, tmp_path / name))
        found.append([(result["history"], result["figures"], result["value"]) for result in trials_of(one)])
        assert [list(trial.intermediate_values) for trial in study.trials] == [[1, 2, 3, 4]] * 2
    assert found[0] == found[1]
    assert [entry["step"] for entry in found[0][0][0]] == [1, 2, 3, 4]


def test_failures_are_reported_with_their_reason_and_deaths_are_retried(share: Share, tmp_path: Path) -> None:
    one = group(tmp_path, "troubled", 4)
    search(tmp_path, [one], troubled, share)
    results = trials_of(one)
    assert [result["state"] for result in results] == ["FAILED", "FAILED", "COMPLETE", "COMPLETE"]
    assert results[0]["reason"] == "the loss is nan at step 1"
    assert "nan" in results[1]["reason"]
    # A failed trial does not count as finished: the next run replaces it.
    assert len(search(tmp_path, [one], troubled, share)) == 2
    assert [result["state"] for result in trials_of(one)][4:] == ["COMPLETE", "COMPLETE"]
    assert search(tmp_path, [one], troubled, share) == []
    assert states(tmp_path, "troubled")[:4] == [
        TrialState.FAIL,
        TrialState.FAIL,
        TrialState.COMPLETE,
        TrialState.COMPLETE,
    ]


def test_a_disk_error_ends_the_search_and_fails_no_trial(share: Share, tmp_path: Path) -> None:
    one = group(tmp_path, "stopped", 3)
    with pytest.raises(OSError, match="the file system has become read-only"):
        search(tmp_path, [one], without_a_disk, share)
    assert {result["state"] for result in trials_of(one)} <= {"COMPLETE"}
    search(tmp_path, [one], bowl, share)
    assert [(result["trial"], result["state"]) for result in trials_of(one)] == [(n, "COMPLETE") for n in range(3)]


def test_a_death_counts_once_whenever_it_comes(share: Share, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    one = group(tmp_path, "dying", 16)
    search(tmp_path, [one], dying, share, EarlyStopping(1, 2, 2), max_retries=16)
    results = trials_of(one)
    assert [result["trial"] for result in results] == list(range(16))
    assert {result["state"] for result in results} <= {"COMPLETE", "STOPPED"}
    said = capfd.readouterr()
    assert "its worker died, trying again (1 of 16)" in said.out
    assert "Traceback" not in said.err


def test_a_repeated_search_runs_what_is_missing(share: Share, tmp_path: Path) -> None:
    search(tmp_path, [group(tmp_path, "grown", 2)], bowl, share)
    before = [result["params"] for result in trials_of(group(tmp_path, "grown", 2))]
    assert search(tmp_path, [group(tmp_path, "grown", 2)], bowl, share) == []
    assert len(search(tmp_path, [group(tmp_path, "grown", 3)], bowl, share)) == 1
    after = [result["params"] for result in trials_of(group(tmp_path, "grown", 3))]
    assert after[:2] == before
    assert after[2] not in before


def test_fewer_trials_than_before_do_not_affect_other_groups(share: Share, tmp_path: Path) -> None:
    search(tmp_path, [group(tmp_path, "full", 3)], bowl, share)
    told = search(tmp_path, [group(tmp_path, "full", 1), group(tmp_path, "empty", 2)], bowl, share)
    assert [result["group"] for result in told] == ["empty", "empty"]


def test_a_trial_that_was_running_when_the_driver_died_resumes_under_its_number(share: Share, tmp_path: Path) -> None:
    storage = open_storage(None, tmp_path)
    study = optuna.create_study(study_name="test/zombie", storage=storage)
    distributions = {
        "x": optuna.distributions.FloatDistribution(0.0, 1.0),
        "kind": optuna.distributions.CategoricalDistribution(["a", "b"]),
    }
    wanted = study.ask(distributions).params
    study.ask({"x": distributions["x"]})  # the driver died between two draws
    one = group(tmp_path, "zombie", 2)
    search(tmp_path, [one], bowl, share)
    assert states(tmp_path, "zombie") == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert [result["trial"] for result in trials_of(one)] == [0, 2]
    assert trials_of(one)[0]["params"] == {"fixed": 3, **wanted}
    study.ask(distributions)
    assert search(tmp_path, [one], bowl, share) == [], "nothing is missing, so the surplus trial is dropped"
    assert TrialState.RUNNING not in states(tmp_path, "zombie")


def test_proposals_and_stops_do_not_depend_on_how_often_the_driver_started(share: Share, tmp_path: Path) -> None:
    """Six trials in one go, and one by one with a new search each time: same values, same outcomes."""
    halving = EarlyStopping(grace=1, longest=4, reduction_factor=3)
    names = [f"g{number}" for number in range(share.at_once)]  # as many groups as run at once: one trial of each
    search(tmp_path / "whole", [group(tmp_path / "whole", name, 6) for name in names], bowl, share, halving)
    for trials in range(1, 7):
        search(tmp_path / "cut", [group(tmp_path / "cut", name, trials) for name in names], bowl, share, halving)
    for name in names:
        whole, cut = (
            [
                (result["params"], result["state"], result["value"])
                for result in trials_of(group(tmp_path / folder, name, 6))
            ]
            for folder in ("whole", "cut")
        )
        assert whole == cut
        assert {state for _, state, _ in whole} == {"COMPLETE", "STOPPED"}


@pytest.fixture(scope="module")
def mixed(share: Share, tmp_path_factory: pytest.TempPathFactory) -> Mixed:
    """Six groups that differ in sampler, space and objectives, in one search."""
    root = tmp_path_factory.mktemp("mixed")
    choices = {"x": Choice(choice=[0.1, 0.2, 0.3]), "kind": Choice(choice=["a", "b"])}
    groups = [
        replace(group(root, "two", 6), objectives=("fvu", "l0"), space={"x": Range(low=0.0, high=1.0)}),
        replace(group(root, "grid", 6), sampler="grid", space=choices),
        replace(group(root, "gp", 6), sampler="gp"),
        replace(group(root, "random", 6), sampler="random"),
        replace(group(root, "earlier", 5), study="old/deltas/g@123"),
        replace(group(root, "whole", 3), space={"x": Range(low=2, high=9)}),
    ]
    told = search(root, groups, bowl, share)
    assert [len(trials_of(one)) for one in groups] == [one.trials for one in groups]
    assert len(told) == sum(one.trials for one in groups), "the last trial of a grid too"
    return root, {one.name: one for one in groups}


def test_two_objectives_give_a_front(mixed: Mixed) -> None:
    root, groups = mixed
    study = optuna.load_study(study_name="test/two", storage=open_storage(None, root))
    assert len(study.directions) == 2
    results = trials_of(groups["two"])
    assert {trial.number for trial in study.best_trials} == pareto_front(results, groups["two"].objectives)
    assert len(study.best_trials) == 6, "each is best at its own trade"


def test_a_grid_is_tried_whole(mixed: Mixed) -> None:
    seen = {(result["params"]["x"], result["params"]["kind"]) for result in trials_of(mixed[1]["grid"])}
    assert seen == {(x, kind) for x in (0.1, 0.2, 0.3) for kind in "ab"}


@pytest.mark.parametrize("sampler", ["gp", "random"])
def test_other_samplers_propose(mixed: Mixed, sampler: str) -> None:
    assert len({result["params"]["x"] for result in trials_of(mixed[1][sampler])}) == 6


def test_a_warm_start_tries_the_best_of_an_earlier_study_first(share: Share, mixed: Mixed) -> None:
    root, groups = mixed
    best = best_of(trials_of(groups["earlier"]))
    assert best is not None
    later = replace(group(root, "later", 4), study="new/deltas/g@456", warm_start="old/deltas/g", seed=9)
    search(root, [later], bowl, share)
    assert trials_of(later)[0]["params"] == best["params"]


def test_whole_ranges_give_whole_numbers(mixed: Mixed) -> None:
    assert all(isinstance(result["params"]["x"], int) for result in trials_of(mixed[1]["whole"]))


def test_a_worker_stays_with_what_it_has_read(tmp_path: Path) -> None:
    """The worker that is free is handed what its last trial read, and a new one what nobody else reads."""
    groups = [replace(group(tmp_path, f"{layer}{width}", 2), reads=layer) for width in "xy" for layer in "abc"]
    runtime = Runtime(open_storage(None, tmp_path), Share(1, 0, 2), 1, tmp_path / ".tune")
    with Progress().bar("trials", 12, "trials") as bar:
        search = GroupedSearch(groups, runtime, bar, lambda group, result: None)
        at, read = {}, {0: "", 1: ""}
        for number in range(12):
            worker = number % 2  # the two take turns: one ends its trial and gets the next
            if worker in at:
                search.on_trial_complete(at[worker], {"val_loss": 1.0, "step": 1, "final": True})
            at[worker] = f"trial{number}"
            read[worker] += search.suggest(at[worker])["group"][0]
        for trial_id in at.values():
            search.on_trial_complete(trial_id, {"val_loss": 1.0, "step": 1, "final": True})
        assert search.suggest("none is left") == "FINISHED"
    assert read == {0: "aaaacc", 1: "bbbbcc"}

"""A study and the result files it must agree with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs.files import write_json
from jobs.search.studies import COMPLETE, FAILED, STOPPED, Group, Study, open_storage
from search_spaces.dimensions import Choice, Dimension, Range

STATES = (COMPLETE, COMPLETE, STOPPED, COMPLETE, FAILED, COMPLETE, COMPLETE, STOPPED, COMPLETE)


def group(root: Path) -> Group:
    space: dict[str, Dimension] = {"x": Range(low=0.0, high=1.0), "kind": Choice(choice=["a", "b"]), "fixed": 3}
    return Group("one", root / "results", space, 20, seed=1, constants={}, study="test/one")


def finish(study: Study, root: Path, state: str) -> None:
    """Asks for one trial, tells its result and writes it, as the search does."""
    trial = study.ask()
    loss = (trial.params["x"] - 0.3) ** 2
    history = [{"step": step, "val_loss": loss + 1 / step} for step in (1, 2)]
    for entry in history:
        study.report(trial, entry["val_loss"], int(entry["step"]))
    record: dict[str, Any] = {
        "trial": trial.number,
        "state": state,
        "value": None if state == FAILED else history[-1]["val_loss"],
        "params": {"fixed": 3, **trial.params},
        "figures": {},
        "history": history,
        "reason": None,
    }
    write_json(root / "results" / f"trial_{trial.number:04d}" / "result.json", record)
    study.tell(trial, record)


@pytest.mark.parametrize("unfinished", [0, 1], ids=["all finished", "one never finished"])
def test_a_lost_storage_is_rebuilt_from_the_files(tmp_path: Path, unfinished: int) -> None:
    storage = open_storage(None, tmp_path / "first")
    study = Study(group(tmp_path), storage)
    for state in STATES[:5]:
        finish(study, tmp_path, state)
    for _ in range(unfinished):
        study.ask()
    for state in STATES[5:]:
        finish(study, tmp_path, state)

    again = Study(group(tmp_path), open_storage(None, tmp_path / "second"))
    assert again.finished == len(STATES) - 1
    assert [trial.number for trial in again.unfinished] == [5] * unfinished
    assert [trial.params for trial in again.unfinished] == [study._study.trials[5].params] * unfinished
    before, after = study._study.trials, again._study.trials
    assert [trial.number for trial in after] == [trial.number for trial in before]
    told = [trial.number for trial in before if trial.state.is_finished()]
    for one, other in ((before[number], after[number]) for number in told):
        assert (one.state, one.values, one.params) == (other.state, other.values, other.params)
        assert one.intermediate_values == other.intermediate_values
    if not unfinished:  # what is proposed next is what would have been proposed
        assert again.ask().params == study.ask().params


@pytest.mark.parametrize("storage", ["kept", "lost"])
def test_a_trial_whose_file_is_gone_is_run_again_under_its_number(tmp_path: Path, storage: str) -> None:
    study = Study(group(tmp_path), open_storage(None, tmp_path))
    for state in STATES:
        finish(study, tmp_path, state)
    (tmp_path / "results" / "trial_0001" / "result.json").unlink()

    again = Study(group(tmp_path), open_storage(None, tmp_path if storage == "kept" else tmp_path / "second"))
    (trial,) = again.unfinished
    assert (trial.number, trial.params) == (1, study._study.trials[1].params)
    again.report(trial, 0.5, step=1)
    again.tell(trial, {"state": COMPLETE, "value": 0.5, "figures": {}})
    assert len(again._study.trials) == len(STATES)
    assert again._study.trials[1].state.is_finished()


def test_a_storage_that_knows_more_than_the_files_is_left_alone(tmp_path: Path) -> None:
    study = Study(group(tmp_path), open_storage(None, tmp_path))
    finish(study, tmp_path, COMPLETE)
    study.ask()
    again = Study(group(tmp_path), open_storage(None, tmp_path))
    assert len(again._study.trials) == 2
    assert [trial.number for trial in again.unfinished] == [1]

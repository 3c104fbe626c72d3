"""Trials of a group that one worker is given together end as one by one: values, states, files and studies."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ray.tune.schedulers import TrialScheduler

from jobs.cluster.connection import Share
from jobs.files import write_json
from jobs.search.halving import EarlyStopping, GroupedHalving, _decisions
from jobs.search.studies import Group, trials_of
from search_spaces.dimensions import Choice
from tests.jobs.search.test_grouped import group, search, states

STEPS = 4
HALVING = EarlyStopping(grace=1, longest=STEPS, reduction_factor=3)


def one(member: dict[str, Any], centre: float, report: Any) -> dict[str, Any]:
    """Best at x = centre; a trial near 1 fails after two validations, others leave a file as trainers do."""
    loss = (member["x"] - centre) ** 2
    for step in range(1, STEPS + 1):
        report({"step": step, "val_loss": loss + 1 / step})
        if step == 2 and member["x"] > 0.95:
            return {"failed": "x is too large"}
    write_json(Path(member["folder"]) / "delta.json", loss)
    return {"step": STEPS, "val_loss": loss + 1 / STEPS}


def bowls(config: dict[str, Any], report: Any) -> dict[str, Any]:
    """The trials of `config`, side by side if they are several; notes how many in the group's folder."""
    members = config.get("side_by_side") or [config]
    folder = Path(members[0]["folder"]).parent
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "calls").open("a") as file:
        file.write(f"{len(members)}\n")
    if len(members) == 1:
        return one(config, config["centre"], report)
    found = []
    for member in members:
        history: list[dict[str, Any]] = []
        found.append({**one(member, config["centre"], history.append), "history": history})
    return {"side_by_side": found}


def too_large(config: dict[str, Any], report: Any) -> dict[str, Any]:
    return {"apart": True} if "side_by_side" in config else bowls(config, report)


def dies_together(config: dict[str, Any], report: Any) -> dict[str, Any]:
    if "side_by_side" in config:
        os._exit(1)
    return bowls(config, report)


def outcome(one: Group) -> list[dict[str, Any]]:
    """What does not depend on the name, nor on when and where trials ran."""
    found = [
        {name: value for name, value in result.items() if name not in ("seconds", "group")} for result in trials_of(one)
    ]
    for result in found:
        del result["started"]
        result["files"] = sorted(p.name for p in (one.folder / f"trial_{result['trial']:04d}").iterdir())
    return found


def calls(one: Group) -> list[int]:
    return [int(line) for line in (one.folder / "calls").read_text().split()]


@pytest.fixture(scope="module")
def alone(share: Share) -> Share:
    """Room for one worker, so that trials one by one are in order."""
    return replace(share, at_once=1)


@pytest.fixture(scope="module", params=[None, HALVING], ids=["all to their end", "stopped early"])
def pairs(request: Any, alone: Share, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Group, Group]]:
    """For each sampler a group whose trials ran one by one, and one whose trials ran together. One search made all of
    them, because a worker takes seconds to start."""
    root = tmp_path_factory.mktemp("pairs")
    choices = {"x": Choice(choice=[0.0, 0.2, 0.3, 0.5, 0.7, 0.9, 1.0])}

    def made(sampler: str, at_once: int) -> Group:
        made = replace(group(root, f"{sampler}{at_once}", 7), sampler=sampler, side_by_side=at_once)
        return replace(made, space=choices) if sampler == "grid" else made

    found = {sampler: (made(sampler, 1), made(sampler, 4)) for sampler in ("tpe", "random", "grid")}
    told = search(root, [one for pair in found.values() for one in pair], bowls, alone, request.param)
    assert len(told) == 6 * 7
    return found


@pytest.mark.parametrize(("sampler", "expected"), [("tpe", [4, 1, 1, 1]), ("random", [4, 3]), ("grid", [4, 3])])
def test_side_by_side_is_one_by_one(pairs, sampler: str, expected: list[int], request) -> None:
    apart, together = pairs[sampler]
    assert outcome(together) == outcome(apart)
    assert states(together.folder.parent, together.name) == states(apart.folder.parent, apart.name)
    assert calls(apart) == [1] * 7
    assert calls(together) == expected
    found = {result["state"] for result in trials_of(together)}
    stopped_early = "stopped early" in request.node.name
    assert ("STOPPED" in found) == stopped_early
    if sampler == "grid":
        assert stopped_early or "FAILED" in found


@pytest.mark.parametrize("at_once", [1, 2])
@pytest.mark.parametrize("trial", [too_large, dies_together])
def test_what_does_not_work_together_is_run_one_by_one(share, tmp_path, trial, at_once, capsys) -> None:
    """Without a retry: none is needed, since it is not known whose fault it was."""
    apart, together = (
        replace(group(tmp_path / name, "bowls", 5), side_by_side=number) for name, number in (("a", 1), ("t", 4))
    )
    search(tmp_path / "a", [apart], bowls, replace(share, at_once=1))
    search(tmp_path / "t", [together], trial, replace(share, at_once=at_once), max_retries=0)
    ours, theirs = outcome(together), outcome(apart)
    # With two workers the fifth may be proposed before the fourth has ended.
    assert ours[:4] == theirs[:4]
    assert at_once == 2 or ours == theirs
    assert len(ours) == 5
    assert calls(together) == [1] * 5
    assert "bowls trials 0, 1, 2, 3: " in capsys.readouterr().out


def test_a_search_that_ends_between_two_of_them_goes_on(alone, tmp_path) -> None:
    """As after a kill: the first trial's file is there, the others' values are kept in the study."""
    told: list[dict[str, Any]] = []

    def full(one: Group, result: dict[str, Any]) -> None:
        told.append(result)
        if len(told) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")

    apart, together = (
        replace(group(tmp_path / name, "bowls", 6), side_by_side=number) for name, number in (("a", 1), ("t", 4))
    )
    search(tmp_path / "a", [apart], bowls, alone, HALVING)
    with pytest.raises(OSError, match="disk is full"):
        search(tmp_path / "t", [together], bowls, alone, HALVING, on_trial=full)
    assert len(trials_of(together)) == 2
    search(tmp_path / "t", [together], bowls, alone, HALVING)
    assert outcome(together)[:6] == outcome(apart)
    assert [result["state"] for result in trials_of(together)].count("FAILED") == 1, "and that is replaced"
    assert calls(together) == [4, 3, 1, 1]


def test_a_bracket_made_again_from_the_files_is_as_it_was(tmp_path: Path) -> None:
    """Trial 1 was not stopped at the time, since trial 0 had not reported yet: all that it reported counts."""
    settings = EarlyStopping(grace=1, longest=4, reduction_factor=2)
    histories = [[{"step": step, "val_loss": loss / step} for step in range(1, 4)] for loss in (0.4, 0.5)]

    def recorded(bracket: Any) -> list[dict[str, float]]:
        return [dict(values) for _, values in bracket._brackets[0]._rungs]

    one = group(tmp_path, "bowls", 3)
    live = GroupedHalving(settings, [one])._brackets["bowls"]
    for number in (1, 0):
        assert all(decision == TrialScheduler.CONTINUE for _, decision in _decisions(live, number, histories[number]))
    for number, history in enumerate(histories):
        write_json(one.folder / f"trial_{number:04d}" / "result.json", {"trial": number, "history": history})
    assert recorded(GroupedHalving(settings, [one])._brackets["bowls"]) == recorded(live)

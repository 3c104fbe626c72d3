"""Which cells of a piece of evaluation stay, and which are made again together."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from evaluators.splice.limits import Limits
from jobs.capture.worker_memory import ModelSpec
from jobs.errors import WorkFailed
from jobs.evaluation.behaviour import Behaviour, EndCell, Raw, finished_ends
from jobs.evaluation.work import LONGEST_PLACE, Shared, SitePlan, place_of
from jobs.files import write_json
from jobs.sweep.stages.evaluate import current_cells
from sites import ATTENTION_OUT, MLP, QKV, Address, Ground, Site

SHARED = Shared("cells", "rows", "rows", "base", ("all",), Limits(4), 8, {})
SITE = SitePlan(Address(Site(1), Ground("change"), 4), "delta", "moments")
WORK = Behaviour(
    "piece",
    "key",
    ModelSpec("model", "cpu", "fp32"),
    SHARED,
    (SITE,),
    "all",
    conditions=("no_delta", "full", "random_delta"),
    doses=(0.0, 0.5, 1.0),
)


def test_strengths_that_were_rows_of_one_batch_are_made_again_together() -> None:
    cells = WORK.cells()
    whole = {name: [] if "random" in name else [0.0, 0.5, 1.0] for name in cells}
    assert WORK.reusable(whole) == set(cells)
    for lost in ("piece_alpha0.5", "piece_full"):
        assert WORK.reusable({name: one for name, one in whole.items() if name != lost}) == {"piece_random_delta"}
    lost_control = {name: one for name, one in whole.items() if "random" not in name}
    assert WORK.reusable(lost_control) == set(lost_control)


def test_a_new_strength_leaves_the_others() -> None:
    whole = {name: [] if "random" in name else [0.0, 0.5, 1.0] for name in WORK.cells()}
    more = dataclasses.replace(WORK, doses=(0.0, 0.5, 1.0, 2.0))
    assert more.reusable(whole) == set(whole)
    assert more.remaining(more.reusable(whole)).strengths == (2.0,)


def test_a_piece_without_strengths_keeps_what_is_there() -> None:
    raw = Raw("piece", "key", WORK.model, SHARED, subset="all")
    assert raw.reusable({"piece": []}) == {"piece"}
    assert raw.reusable({}) == set()


def test_figures_are_taken_only_from_cells_of_the_same_deltas(tmp_path: Path) -> None:
    for name, key in (("ours", "key"), ("others", "another key")):
        write_json(tmp_path / f"{name}.json", {"key": key, "rows": [{"index": 0}, {"index": 1}]})
    work = dataclasses.replace(WORK, shared=dataclasses.replace(SHARED, cells=str(tmp_path)))
    ends = [EndCell("full", "ours", "key"), EndCell("no_delta", "others", "key"), EndCell("no_delta", "missing", "key")]
    assert finished_ends(work, ends, 1) == {"full": [{"index": 0}]}


def test_cells_of_earlier_settings_are_gone_before_new_ones_are_made(tmp_path: Path) -> None:
    """Else a grouping of other deltas would be read in place of one that failed."""
    write_json(tmp_path / "ours.json", {"key": "key", "strengths": [0.5]})
    write_json(tmp_path / "others.json", {"key": "another key"})
    assert current_cells(tmp_path, dict.fromkeys(("ours", "others", "missing"), "key")) == {"ours": [0.5]}
    work = dataclasses.replace(WORK, shared=dataclasses.replace(SHARED, cells=str(tmp_path)))
    assert work.earlier_cell("ours")["key"] == "key"
    with pytest.raises(WorkFailed, match="it needs the cell others, which is missing"):
        work.earlier_cell("others")


def test_a_long_list_of_sites_is_cut_in_names() -> None:
    kinds = (MLP, QKV, ATTENTION_OUT)
    sites = [Site(layer, kind) for layer in range(0, 30, 2) for kind in kinds]
    names = [place_of(sites[: 1 + last], Ground("residual", 0.5), 8) for last in range(len(sites))]
    assert len(set(names)) == len(sites)
    assert max(map(len, names)) == LONGEST_PLACE
    assert all(name.startswith("layer_00") and name.endswith("_p0.50_d008") for name in names)

"""What becomes a parameter of a run: a group's address, and the columns of a cell's kind."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from jobs.files import write_json
from jobs.sweep.stages.evaluate import record_cells
from jobs.tracking.records import record_trial
from jobs.tracking.writer import Record

TRIAL = {
    "trial": 3,
    "started": 1.0,
    "seconds": 2.0,
    "state": "COMPLETE",
    "reason": "",
    "params": {"lr": 0.1},
    "figures": {},
    "history": [],
}


class Kept:
    """A tracker that keeps what it is given."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def record(self, record: Record) -> None:
        self.records.append(record)


@pytest.mark.parametrize(
    ("group", "place"),
    [
        ("layer_08/p0.50/d032", {"layer": 8, "target": "residual", "percentile": 0.5, "d_new": 32}),
        ("layer_08/l0/d1024", {"layer": 8, "target": "residual", "d_new": 1024}),
        ("layer_08/change/d032", {"layer": 8, "target": "change", "d_new": 32}),
        ("lora", {}),
    ],
)
def test_a_trial_has_the_place_of_its_group(group: str, place: dict[str, Any]) -> None:
    kept: Any = Kept()
    record_trial(kept, "lora" if group == "lora" else "deltas", group, TRIAL)
    assert kept.records[0].params == {"lr": 0.1, **place, "state": "COMPLETE", "reason": ""}


def test_a_cell_has_the_columns_of_its_kind(tmp_path: Path) -> None:
    common = {"target": "change", "percentile": None, "d_new": 4, "seed": 0, "key": "k", "seconds": 1.0}
    ranking = {**common, "kind": "ranking", "layers": [0, 2], "features": [], "n_rows": 3}
    change = {**common, "kind": "change", "layers": [{"layer": 0, "rows": [{"index": 0}]}]}
    for cell in (ranking, change):
        write_json(tmp_path / f"{cell['kind']}.json", cell)
    kept: Any = Kept()
    context: Any = SimpleNamespace(tracker=kept, space=SimpleNamespace(cells=tmp_path))
    record_cells(context, ["ranking", "change"])
    first, second = (record.params for record in kept.records)
    assert first == {"kind": "ranking", "target": "change", "layers": "0+2", "d_new": 4}
    assert second == {"kind": "change", "target": "change", "d_new": 4}, "and not all of its rows"

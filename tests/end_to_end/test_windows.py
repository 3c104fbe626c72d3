"""A sweep whose activations do not fit its disk budget: captured, trained and deleted in windows of layers, what bases
leave recomputed."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.study.context import Context
from jobs.study.disk import layer_bytes
from search_spaces.load import load
from tests.end_to_end.conftest import SMALL, together
from tests.end_to_end.damage import tables


@pytest.mark.long("two whole sweeps, one of them in windows", minutes=2)
def test_windows_and_recomputing_change_no_table_and_leave_no_activations(tmp_path: Path) -> None:
    controls = "evaluate.controls=[dense_delta, pca_delta]"
    asked = ("tiny", *SMALL, controls, "deltas.polish_steps=2", "evaluate.cards=0")
    one_layer = layer_bytes(Context(load("tiny", [*SMALL, f"storage.root={tmp_path / 'whole'}"])), 1)
    budget = f"storage.budget_gb={one_layer / 1e9!r}"
    parts = (*asked, f"storage.root={tmp_path / 'parts'}", budget, "storage.base_errors=recomputed")
    whole, parted, planned = together(
        ("sweep", *asked, f"storage.root={tmp_path / 'whole'}"), ("sweep", *parts), ("plan", *parts)
    )
    for done in (whole, parted, planned):
        assert done.returncode == 0, done.stdout + done.stderr
    sweeps = {name: tmp_path / name / "sweeps/tiny" for name in ("whole", "parts")}
    assert "window 2 of 2: layers 2" in parted.stdout
    assert "window 1 of" not in whole.stdout
    assert "2 windows of layers" in planned.stdout
    assert list(sweeps["whole"].rglob("shard_*.safetensors"))
    assert list(sweeps["parts"].rglob("shard_*.safetensors")) == []
    assert tables(sweeps["parts"]) == tables(sweeps["whole"])
    (added,) = together(("sweep", *parts, "deltas.trials=3"))
    assert added.returncode == 0, added.stdout + added.stderr
    assert "window 2 of 2: layers 2" in added.stdout, "what is missing is captured again"
    assert list(sweeps["parts"].rglob("shard_*.safetensors")) == []

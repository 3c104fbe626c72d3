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
    small = (*SMALL, "lora.trials=1", "lora.steps=2", "data.eval_rows=2", "evaluate.curve=false", "evaluate.cards=0")
    asked = ("tiny", *small, controls, "deltas.polish_steps=2")
    one_layer = layer_bytes(Context(load("tiny", [*small, f"storage.root={tmp_path / 'whole'}"])), 1)
    budget = f"storage.budget_gb={one_layer / 1e9!r}"
    parts = (*asked, f"storage.root={tmp_path / 'parts'}", budget, "storage.base_errors=recomputed")
    planned, whole, begun, parted = commands = together(
        ("plan", *parts),
        ("sweep", *asked, f"storage.root={tmp_path / 'whole'}"),
        ("deltas", *parts, "deltas.trials=1", "deltas.polish_steps=0"),
        ("sweep", *parts),
    )
    for done in commands:
        assert done.returncode == 0, done.stdout + done.stderr
    sweeps = {name: tmp_path / name / "sweeps/tiny" for name in ("whole", "parts")}
    assert "2 windows of layers" in planned.stdout
    assert "window 1 of" not in whole.stdout
    assert list(sweeps["whole"].rglob("shard_*.safetensors"))
    assert "window 2 of 2: layers 2" in begun.stdout
    assert "window 2 of 2: layers 2" in parted.stdout, "what is missing is captured again"
    assert list(sweeps["parts"].rglob("shard_*.safetensors")) == []
    assert tables(sweeps["parts"]) == tables(sweeps["whole"])

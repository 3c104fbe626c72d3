"""A sweep whose activations do not fit its disk budget: captured, trained and deleted in windows of layers, what bases
leave recomputed."""

from __future__ import annotations

from pathlib import Path

from jobs.context.context import Context
from jobs.context.disk import site_bytes
from search_spaces.load import load
from sites import Site
from tests.end_to_end.conftest import SMALL, together
from tests.end_to_end.damage import tables


def test_windows_and_recomputing_change_no_table_and_leave_no_activations(seeds, tmp_path: Path) -> None:
    one_layer = site_bytes(Context(load("tiny", [*SMALL, f"storage.root={tmp_path}"])), Site(1))
    parts = ("tiny", *SMALL, f"storage.root={tmp_path}", f"storage.budget_gb={one_layer / 1e9!r}")
    parts = (*parts, "storage.base_errors=recomputed")
    planned, begun, parted = commands = together(
        ("plan", *parts), ("deltas", *parts, "deltas.trials=1"), ("sweep", *parts)
    )
    for done in commands:
        assert done.returncode == 0, done.stdout + done.stderr
    ours, whole = tmp_path / "sweeps/tiny", seeds.root / "sweeps/tiny-s0"
    assert "2 windows of layers" in planned.stdout
    assert "window 1 of" not in seeds.printed
    assert list(whole.rglob("shard_*.safetensors"))
    assert "window 2 of 2: layers 2" in begun.stdout
    assert "window 2 of 2: layers 2" in parted.stdout, "what is missing is captured again"
    assert list(ours.rglob("shard_*.safetensors")) == []
    assert tables(ours) == tables(whole)

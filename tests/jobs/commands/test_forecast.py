"""The simulated schedule against bounds that hold for any schedule, and small cases worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.commands.forecast import Load, _delta_seconds, forecast, makespan
from jobs.files import write_json

UNITS = st.lists(st.floats(min_value=0.1, max_value=1e4), min_size=1, max_size=40)


@given(UNITS, st.integers(min_value=1, max_value=64))
def test_no_schedule_beats_its_bounds_and_ours_is_near_them(units: list[float], workers: int) -> None:
    """Longest first is within 4/3 of the best (Graham 1969), which is at least the mean load and the longest unit."""
    least = max(sum(units) / workers, max(units))
    found = makespan(units, workers)
    assert least * (1 - 1e-9) <= found <= sum(units) * (1 + 1e-9)
    assert found <= least * (1 + 1e-9) + max(units) * (1 - 1 / workers)


def test_the_stage_that_loses_most_is_named() -> None:
    loads = [Load("lora", [100.0] * 4), Load("deltas", [10.0] * 400, alone=20.0)]
    one = forecast(loads, 1)
    assert one.seconds == pytest.approx(4420)
    assert one.busy == pytest.approx(4400 / 4420)
    many = forecast(loads, 400)
    assert many.seconds == pytest.approx(130)
    assert many.limit == "lora: 4 units for 400 workers"
    assert "20s of work that cannot be shared out" in forecast(loads[1:], 400).limit
    assert "its longest unit takes 1m40s" in forecast(loads[:1], 3).limit
    assert forecast(loads[:1], 1).limit == forecast(loads[:1], 4).limit == "the work itself"


def test_trials_that_were_stopped_early_cost_what_they_took(tmp_path: Path) -> None:
    for number, (state, seconds) in enumerate([("COMPLETE", 100.0), ("STOPPED", 30.0), ("FAILED", 5.0)]):
        result = {"state": state, "seconds": seconds}
        write_json(tmp_path / f"deltas/layer_01/change/d004/trial_{number:04d}/result.json", result)
    assert _delta_seconds(tmp_path) == {("change", 4): [100.0, 30.0]}

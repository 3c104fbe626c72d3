"""The lines of docs/formats.md, run as they stand on a finished study: the knob by hand is the sweep's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import plain_knob


def test_files_load_by_hand(finished: tuple[Path, Any]) -> None:
    names: dict[str, Any] = {}
    with plain_knob.named_as_on_the_page(finished[0] / "sweeps/tiny", finished[0] / "models"):
        exec(compile(plain_knob.blocks()[0], "docs/formats.md", "exec"), names)
    assert names["settings"]["name"] == "tiny"
    assert {"input", "target", "label"} <= set(names["rows"])
    assert {"input", "target", "generation"} <= set(names["texts"])
    raw = names["recovered"].query("condition == 'full' and subset == 'tool' and metric == 'mean_ce'")
    assert len(raw)
    assert names["ce"] > 0
    assert {"x", "change"} <= set(names["activations"])
    assert names["activations"]["x"].dtype == torch.bfloat16
    assert sorted(names["base"]) == ["W_dec", "W_enc", "b_dec", "b_enc", "threshold"]
    width = names["settings"]["deltas"]["d_new"][0] + 1
    assert {name: one.shape[-1] for name, one in names["delta"].items() if name != "W_dec"} == dict.fromkeys(
        ("W_enc", "b_enc", "threshold"), width
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_knob_by_hand(finished: tuple[Path, Any], alpha: float) -> None:
    """Its cross-entropy is that of the dose-response table, on every subset."""
    assert len(plain_knob.blocks()[1].strip().splitlines()) < 50
    table = plain_knob.compare(finished[0] / "sweeps/tiny", finished[0] / "models", [alpha])
    assert set(table["subset"]) == {"tool", "copy", "tool_ood"}
    assert table["by_hand"].to_list() == pytest.approx(table["of_the_sweep"].to_list(), rel=plain_knob.ROUNDING)


def test_a_part_and_the_first_groups_by_hand(finished: tuple[Path, Any]) -> None:
    """The ceiling by parts, and what groups recover alone, from the files and plain transformers."""
    where = finished[0] / "sweeps/tiny", finished[0] / "models"
    for table in (plain_knob.compare_parts(*where), plain_knob.compare_groups(*where, 1)):
        assert set(table["subset"]) == {"tool", "copy", "tool_ood"}
        assert table["by_hand"].to_list() == pytest.approx(table["of_the_sweep"].to_list(), rel=plain_knob.ROUNDING)

"""Two workers a trial and a layer, and trials side by side, give the adapters, bases and deltas of one by one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.conftest import SMALL, Jobs, read

FIGURES = ("val_loss", "val_l0_delta", "val_cos")


def test_two_workers_and_two_trials_at_once_change_no_figure(jobs: Jobs, seeds, tmp_path: Path) -> None:
    asked = ("deltas.side_by_side=2", "deltas.workers_per_trial=2", "transcoders.workers_per_layer=2")
    asked = (*asked, "lora.workers_per_trial=2")
    fewer = ("deltas.targets=[residual]", "evaluate.controls=[]", "transcoders.layers=[1]", "compute.max_concurrent=2")
    done = jobs("deltas", "tiny", *SMALL, *fewer, *asked, f"storage.root={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    ours, theirs = tmp_path / "sweeps/tiny", seeds.root / "sweeps/tiny-s0"
    adapters = sorted(theirs.glob("lora/trial_*/result.json"))
    assert len(adapters) == 2
    for path in adapters:
        one, other = (read(root / path.relative_to(theirs)) for root in (ours, theirs))
        assert (one["state"], one["params"]) == (other["state"], other["params"])
        losses, expected = ([figures["val_loss"] for figures in found["history"]] for found in (one, other))
        assert len(losses) > 1
        assert losses == pytest.approx(expected, rel=2e-4), path
    (base,), (other,) = (read(root / "transcoders/layer_1/manifest.json")["bases"] for root in (ours, theirs))
    assert base["val_fvu"] == pytest.approx(other["val_fvu"], rel=1e-2)
    results = sorted(theirs.glob("deltas/layer_01/p*/**/trial_*/result.json"))
    assert len(results) == 2
    for path in results:
        one, other = (read(root / path.relative_to(theirs)) for root in (ours, theirs))
        assert (one["state"], one["params"]) == (other["state"], other["params"])
        assert [figures["step"] for figures in one["history"]] == [figures["step"] for figures in other["history"]]
        for name in FIGURES:
            assert one["figures"][name] == pytest.approx(other["figures"][name], rel=1e-2, abs=1e-3), path
    left = [{path.relative_to(root) for path in root.glob("deltas/layer_01/p*/**/*")} for root in (ours, theirs)]
    left[1] = {path for path in left[1] if path.name != "moments.safetensors"}  # made for controls, which evaluate
    assert left[0] == left[1]

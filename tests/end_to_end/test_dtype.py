"""A finished sweep evaluated again in bf16: nothing is trained again, the checks pass, the figures are near."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from tests.end_to_end.conftest import SMALL, Jobs, read


def test_bf16_trains_nothing_again_and_passes_the_checks(jobs: Jobs, own_seeds: Path) -> None:
    sweep = own_seeds / "sweeps/tiny-s0"
    metrics = sweep / "report/exp2A_metrics.csv"
    before = pd.read_csv(metrics)
    same = (*SMALL, "name=tiny-s0", "seed=0", f"storage.root={own_seeds}")
    done = jobs("sweep", "tiny", *same, "model.dtype=bf16")
    assert done.returncode == 0, done.stdout + done.stderr
    for stage in ("data", "lora", "transcoders", "deltas"):
        assert f"{stage}: done already" in done.stdout
    assert "evaluate: done already" not in done.stdout, done.stdout
    after = pd.read_csv(metrics)
    assert len(after) == len(before)
    assert after["mean_ce"].to_numpy() == pytest.approx(before["mean_ce"].to_numpy(), rel=1e-2)
    assert (after["mean_ce"] != before["mean_ce"]).any()
    for target in ("change", "residual"):
        checks = read(sweep / f"checks_{target}.json")["checks"]
        assert all(check["passed"] for check in checks), checks

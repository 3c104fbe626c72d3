"""Joint polish in a whole study: what it changes, and what it leaves as it was."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient

from tests.end_to_end.conftest import EVERY, Jobs, read


def test_deltas_that_were_trained_together_take_the_others_place(own: Path, jobs: Jobs) -> None:
    """The searches stay as they are; every later table is of the polished deltas, and says so."""
    sweep = own / "sweeps" / "tiny"
    trials = {path: path.stat().st_mtime_ns for path in sweep.glob("deltas/layer_*/*/d*/trial_*/result.json")}
    before = pd.read_csv(sweep / "report/exp2A_metrics.csv")
    polish = ("deltas.polish_steps=6", "evaluate.cards=0", "evaluate.curve=false", "evaluate.controls=[]")
    done = jobs("sweep", "tiny", f"storage.root={own}", *polish, "compute.max_concurrent=1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {path: path.stat().st_mtime_ns for path in trials} == trials
    figures = read(sweep / "deltas/manifest.json")["polished"]
    assert set(figures) == {"d004", "d008"}
    assert any(one["step"] for one in figures.values()), "some step was better than none"
    after = pd.read_csv(sweep / "report/exp2A_metrics.csv")
    chosen = read(sweep / "cells/manifest.json")["chosen"]["change"]["d_new"]
    place = ["target", "layer", "subset", "condition"]
    ce = [table.set_index(place)["mean_ce"] for table in (before, after)]
    for subset in after["subset"].unique():
        assert ce[1]["residual", "1+2", subset, "full"] == ce[0]["residual", "1+2", subset, "full"]
        full = [table["change", EVERY, subset, "full"] for table in ce]
        same = full[1] == pytest.approx(full[0], abs=1e-6)
        assert same == (figures[f"d{chosen:03d}"]["step"] == 0), "the polished deltas are spliced in"
        assert ce[1]["change", EVERY, subset, "no_delta"] == pytest.approx(ce[0]["change", EVERY, subset, "no_delta"])
    assert "were then trained together" in (sweep / "report/report.html").read_text()
    client = MlflowClient(f"sqlite:///{own / 'mlflow.db'}")
    (experiment,) = [one for one in client.search_experiments() if one.name == "tiny"]
    runs = client.search_runs([experiment.experiment_id], max_results=5000)
    assert {"polished/d004", "polished/d008"} <= {run.info.run_name for run in runs}

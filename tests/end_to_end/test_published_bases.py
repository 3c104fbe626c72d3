"""The Gemma preset's code path: a small Gemma-2 and npz files in Gemma Scope's layout, made on the fly."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from models.tiny import build_tiny_gemma2
from tests.end_to_end.conftest import Jobs, read, together

D_MODEL, D_SAE, LAYERS = 32, 96, 4
AVERAGE_L0 = {0: (5, 11, 30), 1: (4, 9), 2: (6, 13, 29, 60), 3: (8,)}
"""The published set differs from layer to layer."""
SCALED_DOWN = (
    "data.train_rows=80", "data.validation_rows=8", "data.eval_rows=3", "data.text_train_lines=40",
    "data.text_validation_lines=12", "lora.trials=1", "lora.steps=4", "lora.eval_every=2", "lora.space.r=2",
    "lora.space.batch_size=4", "activations.train_tokens=1500", "activations.validation_tokens=400",
    "activations.batch_tokens=1024", "deltas.trials=1", "deltas.epochs=1", "deltas.batch_size=256",
    "deltas.d_new=[4]", "deltas.sites=[mlp]", "evaluate.sets=[{layers: each, alphas: []}, [1], [2]]",
    "evaluate.max_new_tokens=6",
    "compute.gpus_per_trial=0", "compute.max_concurrent=1",
    "compute.precision=fp32", "evaluate.cards=4",
)  # fmt: skip


def publish(folder: Path) -> None:
    generator = np.random.default_rng(0)
    for layer, sparsities in AVERAGE_L0.items():
        for average_l0 in sparsities:
            path = folder / f"layer_{layer}" / "width_16k" / f"average_l0_{average_l0}"
            path.mkdir(parents=True)
            arrays = {
                "W_enc": generator.normal(size=(D_MODEL, D_SAE)) / D_MODEL**0.5,
                "W_dec": generator.normal(size=(D_SAE, D_MODEL)) * 0.1,
                "b_enc": np.zeros(D_SAE),
                "b_dec": np.zeros(D_MODEL),
                "threshold": np.full(D_SAE, 1.0),
            }
            np.savez(path / "params.npz", **{key: array.astype(np.float32) for key, array in arrays.items()})


@pytest.fixture
def asked(tmp_path: Path) -> tuple[str, ...]:
    """The preset on a small model and small published transcoders."""
    build_tiny_gemma2(tmp_path / "gemma", seed=0)
    publish(tmp_path / "scope")
    return (
        "gemma2_2b",
        f"model.source={tmp_path / 'gemma'}",
        f"transcoders.source={tmp_path / 'scope'}",
        f"storage.root={tmp_path / 'runs'}",
        *SCALED_DOWN,
    )


def test_studies_run_on_published_transcoders(jobs: Jobs, asked: tuple[str, ...], tmp_path: Path) -> None:
    sweep = tmp_path / "runs" / "sweeps" / "gemma2_2b"
    _the_full_study(jobs, asked, sweep)
    _a_target_l0_and_another_convention(asked, sweep)


def _the_full_study(jobs: Jobs, asked: tuple[str, ...], sweep: Path) -> None:
    done = jobs("sweep", *asked)
    assert done.returncode == 0, done.stdout + done.stderr
    chosen = read(sweep / "transcoders" / "manifest.json")["chosen"]
    # Index min(n - 1, int(n * p)) by ascending L0.
    assert chosen["0"] == {
        "0.25": "layer_0/width_16k/average_l0_5",
        "0.50": "layer_0/width_16k/average_l0_11",
        "0.75": "layer_0/width_16k/average_l0_30",
    }
    assert chosen["2"]["0.25"] == "layer_2/width_16k/average_l0_13"
    assert set(chosen["3"].values()) == {"layer_3/width_16k/average_l0_8"}
    reconstruction = pd.read_csv(sweep / "report" / "exp1_metrics.csv")
    assert len(reconstruction) == LAYERS * 3
    conditions = pd.read_csv(sweep / "report" / "exp2A_metrics.csv", dtype={"layer": str})
    assert set(conditions.loc[conditions["condition"] == "full", "layer"]) == {"0", "1", "2", "3"}
    for errors in (sweep / "deltas").glob("layer_*/p*/residual/manifest.json"):
        assert read(errors)["val_fvu_base_unfinetuned"] > 0
    assert "before finetuning" in (sweep / "report" / "report.html").read_text()
    assert not (sweep / "activations" / "base" / "train").exists(), "nothing is trained on the un-finetuned stream"
    doses = pd.read_csv(sweep / "report" / "exp2B_metrics.csv", dtype={"layer": str})
    assert set(doses["layer"]) == {"1", "2"}
    assert set(doses["alpha"]) == {0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0}


def _a_target_l0_and_another_convention(asked: tuple[str, ...], sweep: Path) -> None:
    """One base is selected by its L0, and every table names the convention."""
    asked = (
        *asked,
        "transcoders.convention=resid_mid/sqrt(d_model)",
        "transcoders.layers=[1, 2]",
        "deltas.targets=[residual]",
        "deltas.percentiles=[]",
        "evaluate.controls=[]",
        "deltas.target_l0=12",
        "deltas.objectives=val_error, val_l0_delta",
        "deltas.threshold=learned",
        "deltas.trials=2",
    )
    planned, done = together(("plan", *asked), ("sweep", *asked))
    assert planned.returncode == 0, planned.stdout + planned.stderr
    assert "l0 layer_2/width_16k/average_l0_13" in planned.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    assert "lora: done already" in done.stdout
    chosen = read(sweep / "transcoders" / "manifest.json")["chosen"]
    assert chosen == {
        "1": {"l0": "layer_1/width_16k/average_l0_9"},
        "2": {"l0": "layer_2/width_16k/average_l0_13"},
    }
    for table in ("exp1_metrics.csv", "exp2A_metrics.csv", "exp2B_metrics.csv"):
        rows = pd.read_csv(sweep / "report" / table)
        spliced = rows if "condition" not in rows else rows[rows["condition"] != "raw"]
        assert len(spliced)
        assert set(spliced["convention"]) == {"resid_mid/sqrt(d_model)"}, table
        assert spliced["percentile"].isna().all()
    assert '<th scope="col">pareto' in (sweep / "report" / "report.html").read_text()
    features = pd.read_csv(sweep / "report" / "features.csv")
    assert sorted(features["layer"]) == [1, 1, 2, 2]
    assert set(features["target"]) == {"residual"}


def test_a_missing_layer_is_named(jobs: Jobs, asked: tuple[str, ...]) -> None:
    done = jobs("transcoders", *asked, "transcoders.width=65k")
    assert done.returncode == 2, done.stdout + done.stderr
    assert "layer_0/width_65k" in done.stderr
    assert "Traceback" not in done.stderr

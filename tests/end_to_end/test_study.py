"""The tiny study with real Ray, Tune, Optuna, MLflow and TransformerLens: what it writes."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import optuna
import pandas as pd
import pytest
from mlflow import MlflowClient
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from tests.end_to_end.conftest import EVERY, Jobs, of_every_kind, read, together

Finished = tuple[Path, subprocess.CompletedProcess[str]]
SETS = {
    "change": [*(of_every_kind(layers) for layers in ([0], [1], [3], [1, 2])), EVERY, "0-3"],
    "residual": ["1", "1+2"],
}
CONTROLLED = {"change": [of_every_kind([1]), EVERY], "residual": ["1", "1+2"]}
DOSED = {"change": EVERY, "residual": "1+2"}
"""The sets of sites of the tiny preset, those with controls, and those measured at every alpha."""
SUBSETS = {"tool", "copy", "tool_ood"}
OF_BOTH = ["random_delta", "shuffled_delta", "dense_delta"]
OF_CHANGE = ["pca_delta"]
OF_RESIDUAL = ["base_model_no_delta", "mlp_swap", "error_term"]
"""Controls that have no strength, of both targets' deltas and of one target's alone."""


@pytest.fixture
def sweep(finished: Finished) -> Path:
    return finished[0] / "sweeps" / "tiny"


def runs_of(root: Path, name: str = "tiny"):
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    experiment = client.get_experiment_by_name(name)
    return client, list(client.search_runs([experiment.experiment_id], max_results=5000))


def test_it_ends_with_a_table_and_the_path_of_the_report(finished: Finished, sweep: Path) -> None:
    assert f"report: {sweep / 'report' / 'report.html'}" in finished[1].stdout
    assert f"features: {sweep / 'report' / 'features.html'}" in finished[1].stdout
    for word in ("recovered", "features for 90%", "tool_ood", "[6/6] report"):
        assert word in finished[1].stdout
    assert "\x1b[" not in finished[1].stdout, "control characters in a plain log"


def test_every_table_has_its_rows(sweep: Path) -> None:
    report = sweep / "report"
    reconstruction = pd.read_csv(report / "exp1_metrics.csv")
    assert len(reconstruction) == 2 * 2 * 2  # layers x percentiles x d_new
    assert (reconstruction["fvu_full"] < reconstruction["fvu_base"]).mean() > 0.5
    summary = pd.read_json(report / "exp1_combo_summary.json")
    assert len(summary) == 2 * 2
    conditions = pd.read_csv(report / "exp2A_metrics.csv")
    spliced = conditions[conditions["layer"] != "none"]
    assert set(spliced["condition"]) == {"no_delta", "full", *OF_BOTH, *OF_CHANGE, *OF_RESIDUAL}
    for target, layers in SETS.items():
        assert set(spliced.loc[spliced["target"] == target, "layer"]) == set(layers)
    assert set(conditions["subset"]) == SUBSETS
    assert (conditions["n_examples"] == 4).all()
    assert conditions["delta_ce"].notna().all()
    assert (conditions.loc[conditions["condition"] == "raw", "kl"] == 0).all()
    of_finetuned = spliced[~spliced["condition"].isin(["error_term", "base_model_no_delta"])]
    assert (of_finetuned["kl"] > 0).all()
    assert (spliced["delta_ce_low"] <= spliced["delta_ce"]).all()
    features = pd.read_csv(report / "features.csv")
    assert features["target"].value_counts().to_dict() == {"change": 4}
    assert features["ablated_ce_tool"].notna().all()
    assert 'id="L' in (report / "features.html").read_text()
    doses = pd.read_csv(report / "exp2B_metrics.csv")
    assert set(doses["alpha"]) == {0.0, 0.5, 1.0}
    # alphas x subsets x (both targets' deltas, those of MLPs alone, and the scaled weights)
    assert len(doses) == 3 * len(SUBSETS) * 4


def test_gaps_recovered_shares_and_the_curve_have_their_rows(sweep: Path) -> None:
    report = sweep / "report"
    gaps = pd.read_csv(report / "gaps.csv")
    ce = gaps[(gaps["target"] == "change") & (gaps["metric"] == "mean_ce")]
    assert set(ce["layer"]) == set(SETS["change"])
    assert ce["unfinetuned"].notna().all()
    recovered = pd.read_csv(report / "recovered.csv")
    of_change = recovered[recovered["target"] == "change"]
    assert set(of_change["condition"]) == {"full", "alpha", "scaled_weights", *OF_BOTH, *OF_CHANGE}
    widths = pd.read_csv(report / "widths.csv")
    assert set(widths["condition"]) == {"full", "dense_delta", "pca_delta"}
    assert set(widths["d_new"]) == {4, 8}
    assert set(widths["layer"]) == {EVERY}
    chosen = widths[widths["d_new"] == of_change["d_new"].dropna().iloc[0]]
    assert set(chosen["value"]) <= set(of_change["value"]), "those of the chosen width are the same cells"
    curve = pd.read_csv(report / "few_features.csv")
    ranking = pd.read_csv(report / "feature_ranking.csv")
    assert len(ranking) == 12 * (curve["d_new"].iloc[0] + 1)
    assert ranking["at_bos"].sum() == 12
    assert curve["k"].max() == len(ranking)
    by_k = curve.set_index(["subset", "k"])["mean_ce"]
    conditions = pd.read_csv(report / "exp2A_metrics.csv")
    whole = conditions[(conditions["layer"] == EVERY) & (conditions["target"] == "change")]
    for row in whole.itertuples():
        if row.condition in ("no_delta", "full"):
            k = 0 if row.condition == "no_delta" else len(ranking)
            assert by_k[row.subset, k] == pytest.approx(row.mean_ce, rel=1e-5)
    change = pd.read_csv(report / "change_by_subset.csv")
    assert len(change) == 12 * 2 * len(SUBSETS) * 2  # sites x d_new x subsets x parts


def test_the_parts_lie_between_the_two_models(sweep: Path) -> None:
    parts = pd.read_csv(sweep / "report" / "parts.csv")
    assert set(parts["subset"]) == SUBSETS
    assert set(parts["way"]) == {"unfinetuned", "finetuned"}
    conditions = pd.read_csv(sweep / "report" / "exp2A_metrics.csv")
    for subset in SUBSETS:
        cell = read(sweep / "cells" / f"parts_{subset}.json")
        for model, condition in (("finetuned", "raw"), ("unfinetuned", "base_model_raw")):
            ce = sum(row["nll"] for row in cell[model]) / sum(row["n_tokens"] for row in cell[model])
            whole = conditions[(conditions["subset"] == subset) & (conditions["condition"] == condition)]
            assert ce == pytest.approx(whole["mean_ce"].item(), rel=1e-5), "nothing that changed is in no part"


def test_the_ends_of_the_dense_knob_are_the_swapped_and_the_finetuned_model(sweep: Path) -> None:
    doses = pd.read_csv(sweep / "report" / "exp2B_metrics.csv")
    doses = doses[doses["layer"] != "0-3"].set_index(["condition", "subset", "alpha"])
    conditions = pd.read_csv(sweep / "report" / "exp2A_metrics.csv")
    raw = conditions[conditions["condition"] == "raw"].set_index("subset")
    for subset in SUBSETS:
        dense = doses.loc[("scaled_weights", subset)]["mean_ce"]
        assert dense[1.0] == raw.loc[subset, "mean_ce"]
        sparse = doses.loc[("alpha", subset)]
        assert dense[0.0] == sparse[sparse["target"] == "change"]["mean_ce"][0.0]
        assert dense[0.5] not in (dense[0.0], dense[1.0])


def test_alpha_zero_and_one_are_no_delta_and_full_to_the_last_digit(sweep: Path) -> None:
    place = ["target", "layer", "subset"]
    conditions = pd.read_csv(sweep / "report" / "exp2A_metrics.csv").set_index([*place, "condition"])["mean_ce"]
    doses = pd.read_csv(sweep / "report" / "exp2B_metrics.csv")
    doses = doses[doses["condition"] == "alpha"].set_index([*place, "alpha"])["mean_ce"]
    for target, layer in DOSED.items():
        for subset in SUBSETS:
            for alpha, condition in ((0.0, "no_delta"), (1.0, "full")):
                assert doses[target, layer, subset, alpha] == conditions[target, layer, subset, condition]


def test_every_exactness_check_holds(sweep: Path) -> None:
    for target, count in (("change", 20), ("residual", 12)):  # one layer, and all layers at once
        checks = read(sweep / f"checks_{target}.json")["checks"]
        assert len(checks) == count
        assert [check for check in checks if not check["passed"]] == []


def test_the_report_stands_alone(sweep: Path) -> None:
    html = (sweep / "report" / "report.html").read_text()
    parts = "h2>Where the finetuning lives"
    first = ("h1>What finetuning changed", parts, "h3>The answer", "h3>How few features?", "h2>Checks")
    order = [html.index(f"<{heading}<") for heading in first]
    assert order == sorted(order), "where to look, then the answer"
    assert "tiny-gemma2 before and after LoRA finetuning on" in html
    assert 'src="data:image/png;base64,' in html
    assert "http://" not in html.replace("http://www.w3.org", "")
    assert len(list((sweep / "report" / "graphs").glob("*.png"))) >= 8


def test_generations_are_kept_row_by_row(sweep: Path) -> None:
    lines = (sweep / "generations" / "raw_tool.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert {"input", "target", "generation", "tokens", "condition"} <= set(json.loads(lines[0]))


def test_mlflow_holds_the_run_tree(finished: Finished, sweep: Path) -> None:
    client, runs = runs_of(finished[0])
    by_id = {run.info.run_id: run for run in runs}
    names = Counter(run.info.run_name for run in runs if "mlflow.parentRunId" not in run.data.tags)
    assert names == {"tiny": 1}
    children = Counter(
        by_id[run.data.tags["mlflow.parentRunId"]].info.run_name
        for run in runs
        if "mlflow.parentRunId" in run.data.tags
    )
    assert children["tiny"] == 6
    assert children["lora"] == 4
    assert children["deltas"] == 2 * (12 * 2 + 2 * 2 * 2)  # trials x (change: sites x d_new, residual: and bases)
    cells = read(sweep / "cells" / "manifest.json")["cells"]
    assert children["evaluate"] == len(cells)
    assert {run.info.status for run in runs} <= {"FINISHED", "KILLED"}
    trial = next(run for run in runs if run.info.run_name == "trial_0000")
    assert "val_loss" in trial.data.metrics
    assert "lr" in trial.data.params
    assert len(client.get_metric_history(trial.info.run_id, "val_loss")) >= 1
    cell = next(run for run in runs if run.info.run_name.endswith("_tool_full"))
    assert cell.data.params["condition"] == "full"
    assert "mean_ce" in cell.data.metrics
    root = next(run for run in runs if run.info.run_name == "tiny")
    assert "recovered_ce_tool" in root.data.metrics, "sweeps compare by their headline figures"
    artifacts = {entry.path for entry in client.list_artifacts(root.info.run_id)}
    assert {"report.html", "exp2A_metrics.csv", "graphs", "generations"} <= artifacts


def test_optuna_holds_a_study_for_each_group(finished: Finished) -> None:
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(finished[0] / "optuna" / "journal.log")))
    names = optuna.get_all_study_names(storage)
    assert len(names) == 1 + 12 * 2 + 2 * 2 * 2
    for name in names:
        states = Counter(trial.state for trial in optuna.load_study(study_name=name, storage=storage).trials)
        assert states[TrialState.COMPLETE] >= 1
        assert states[TrialState.RUNNING] == 0


def test_no_pickle_is_left(finished: Finished) -> None:
    assert [path for path in finished[0].rglob("*") if path.suffix in (".pkl", ".pt", ".pickle")] == []


def test_a_second_run_finds_everything_done(finished: Finished, jobs: Jobs) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished[0] / "sweeps/tiny/cells").iterdir()}
    again = jobs("sweep", "tiny", f"storage.root={finished[0]}", timeout=200)
    assert again.returncode == 0, again.stderr
    assert "everything is done already" in again.stdout
    assert "report.html" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in (finished[0] / "sweeps/tiny/cells").iterdir()}


def test_another_server_gets_everything_from_disk(finished: Finished, jobs: Jobs, tmp_path: Path) -> None:
    """The store is gone: `track` sends the same runs with the same metrics, and a second `track` sends nothing."""
    copied = tmp_path / "mlruns"
    shutil.copytree(finished[0], copied)
    (copied / "mlflow.db").unlink()
    for _ in range(2):
        sent = jobs("track", "tiny", f"storage.root={copied}", timeout=120)
        assert sent.returncode == 0, sent.stdout + sent.stderr
        assert "all results of tiny are in MLflow" in sent.stdout
        expected, found = (
            {run.data.tags["deltascope.key"]: run for run in runs_of(root)[1]} for root in (finished[0], copied)
        )
        assert set(found) == set(expected)
        assert len(runs_of(copied)[1]) == len(found)
        for key, run in expected.items():
            assert found[key].info.status == run.info.status
            assert set(found[key].data.metrics) == set(run.data.metrics)
            assert found[key].data.metrics.get("val_loss") == run.data.metrics.get("val_loss")
    assert jobs("track", "tiny", f"storage.root={tmp_path / 'nothing'}").returncode == 2


def test_a_bases_error_before_finetuning_is_that_of_its_training(sweep: Path) -> None:
    chosen = read(sweep / "transcoders/manifest.json")["chosen"]
    for layer, bases in chosen.items():
        for percentile, base in bases.items():
            errors = read(sweep / f"deltas/layer_{int(layer):02d}/p{percentile}/residual/manifest.json")
            trained = read(sweep / "transcoders" / base / "config.json")
            assert errors["val_fvu_base_unfinetuned"] == pytest.approx(trained["val_fvu"], rel=1e-3)
            assert errors["val_fvu_base_unfinetuned"] != errors["val_fvu_base"]


def test_every_control_is_in_every_cell(sweep: Path) -> None:
    for control in OF_BOTH + OF_CHANGE + OF_RESIDUAL:
        targets = [one for one, own in (("change", OF_CHANGE), ("residual", OF_RESIDUAL)) if control in OF_BOTH + own]
        sets = sum(len(CONTROLLED[target]) for target in targets)
        assert len(list((sweep / "cells").glob(f"layer_*_{control}.json"))) == sets * len(SUBSETS)
    for subset in SUBSETS:
        raw = read(sweep / f"cells/raw_{subset}.json")["rows"]
        for path in (sweep / "cells").glob(f"layer_*_{subset}_error_term.json"):
            for one, whole in zip(read(path)["rows"], raw, strict=True):
                assert one["nll"] == pytest.approx(whole["nll"], rel=1e-4)
    conditions = pd.read_csv(sweep / "report/exp2A_metrics.csv")
    ce = conditions.set_index(["condition", "subset"]).mean_ce
    for row in conditions[conditions.condition == "base_model_no_delta"].itertuples():
        assert row.delta_ce == pytest.approx(row.mean_ce - ce["base_model_raw", row.subset])
    for row in conditions[conditions.condition == "base_model_raw"].itertuples():
        assert row.delta_ce == pytest.approx(row.mean_ce - ce["raw", row.subset])
        assert row.delta_ce > 0, "finetuning has changed something"


def test_a_new_alpha_and_a_second_seed_compute_new_cells_only(own: Path) -> None:
    root, sweep = own, own / "sweeps" / "tiny"
    kept = [sweep / "lora/best.json", sweep / "deltas/layer_01/p0.25/d004/best.json", sweep / "cells/raw_tool.json"]
    before = [path.stat().st_mtime_ns for path in kept[1:]]
    adapter = (sweep / "lora/trial_0000/result.json").stat().st_mtime_ns
    more = ("evaluate.alphas=[0.0, 0.5, 1.0, 2.0]", "evaluate.replicas=2")
    asked = ("tiny", f"storage.root={root}", *more)
    done, reported = together(("evaluate", *asked), ("report", *asked))
    assert done.returncode == 0, done.stdout + done.stderr
    of_best = [path for path in (sweep / "cells").glob("*_alpha2.0.json") if "scaled_weights" not in path.name]
    assert len(of_best) == 2 * (len(DOSED) + 1) * len(SUBSETS)  # and the set of all MLPs
    seeds = [read(path) for path in (sweep / "cells").glob("*_s1_*.json")]
    assert {one["condition"] for one in seeds} == {"full", "alpha", *OF_BOTH, *OF_CHANGE}
    assert reported.returncode == 0, reported.stdout + reported.stderr
    conditions = pd.read_csv(sweep / "report/exp2A_metrics.csv")
    assert set(conditions[conditions.condition == "full"].n_replicas) == {2}
    assert set(conditions[conditions.condition == "no_delta"].n_replicas) == {1}
    assert [path.stat().st_mtime_ns for path in kept[1:]] == before
    assert (sweep / "lora/trial_0000/result.json").stat().st_mtime_ns == adapter
    _, runs = runs_of(root)
    keys = [run.data.tags["deltascope.key"] for run in runs]
    assert len(keys) == len(set(keys))


def test_a_plan_forecasts_more_workers_from_a_finished_sweep(finished: Finished) -> None:
    plan = ("plan", "tiny")
    planned, elsewhere = together(
        (*plan, f"storage.root={finished[0]}", "--gpus", "3"), (*plan, "--measured", str(finished[0]))
    )
    assert planned.returncode == 0, planned.stdout + planned.stderr
    for workers in (1, 3, 8, 64, 512):
        assert f"on {workers} worker" in planned.stdout
    assert "% busy; limited by" in planned.stdout
    assert elsewhere.returncode == 2
    assert "has no sweep" in elsewhere.stdout + elsewhere.stderr

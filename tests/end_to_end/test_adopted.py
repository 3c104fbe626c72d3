"""A finetuned model that was made elsewhere gives the tables that it gave where it was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd

from tests.end_to_end.conftest import SMALL, Jobs, read, together

NAME = "tiny-s0"


def tables(root: Path) -> dict[str, str]:
    """Every table of the sweep's report, without the seconds in it."""
    found = {}
    for path in sorted((root / "sweeps" / NAME / "report").glob("*.csv")):
        table = pd.read_csv(path)
        found[path.name] = table.drop(columns=[name for name in table if name == "seconds"]).to_csv()
    return found


def test_an_adopted_model_gives_the_tables_of_the_trained_one(jobs: Jobs, seeds, tmp_path: Path) -> None:
    """The adapter's study has the same tables. Merged, it is the trained model to the last byte, and the study of that
    begins with the same answers."""
    lora = seeds.root / "sweeps" / NAME / "lora"
    adapter = lora / f"trial_{read(lora / 'best.json')['trial']:04d}" / "adapter"
    trained, asked = tables(seeds.root), ("tiny", *SMALL, f"name={NAME}")
    assert len(trained) > 8
    done = jobs("sweep", *asked, f"storage.root={tmp_path / 'adapter'}", f"model.finetuned={adapter}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "its adapter was merged" in done.stdout
    assert tables(tmp_path / "adapter") == trained
    ours = tmp_path / "adapter" / "sweeps" / NAME
    weights = "merged/model.safetensors"
    assert (ours / "lora" / weights).read_bytes() == (lora / weights).read_bytes()
    assert "made elsewhere and adopted" in (ours / "report" / "report.html").read_text()

    done = jobs("lora", *asked, f"storage.root={tmp_path / 'whole'}", f"model.finetuned={lora / 'merged'}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "adopted as it is" in done.stdout
    whole = tmp_path / "whole" / "sweeps" / NAME / "lora"
    assert not (whole / "merged").exists(), "it is used where it lies"
    assert read(whole / "validation.json")["rows"] == read(lora / "validation.json")["rows"]


def test_what_is_no_pair_is_refused_before_anything_is_done(finished, tmp_path: Path) -> None:
    root, _ = finished
    merged = root / "sweeps" / "tiny" / "lora" / "merged"
    config = json.loads((merged / "config.json").read_text())
    other = Path(shutil.copytree(merged, tmp_path / "other"))
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gemma"}))
    pickled = Path(shutil.copytree(merged, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    runs = tmp_path / "runs"
    wrong = [
        (runs, tmp_path / "nowhere", "there is no model"),
        (runs, other, "has architecture gemma, model.source tiny-gemma2 has gemma2"),
        (runs, pickled, "pickled weights are not read"),
        (root, merged, "this sweep's own folder"),
    ]
    asked = [("sweep", "tiny", f"storage.root={place}", f"model.finetuned={given}") for place, given, _ in wrong]
    for done, (_, _, said) in zip(together(*asked), wrong, strict=True):
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.startswith("error: model.finetuned: ")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1

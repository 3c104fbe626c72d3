"""A finetuned model that was made elsewhere gives the tables that it gave where it was trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from tests.end_to_end.conftest import Jobs, read


def tables(root: Path) -> dict[str, str]:
    """Every table of the sweep's report, without the seconds in it."""
    found = {}
    for path in sorted((root / "sweeps" / "tiny" / "report").glob("*.csv")):
        table = pd.read_csv(path)
        found[path.name] = table.drop(columns=[name for name in table if name == "seconds"]).to_csv()
    return found


@pytest.mark.long("two whole studies of an adapter that another one trained")
def test_an_adopted_model_gives_the_tables_of_the_trained_one(jobs: Jobs, finished, tmp_path: Path) -> None:
    root, _ = finished
    lora = root / "sweeps" / "tiny" / "lora"
    adapter = lora / f"trial_{read(lora / 'best.json')['trial']:04d}" / "adapter"
    trained, one = tables(root), ("compute.max_concurrent=1",)
    assert len(trained) > 8
    for name, given, said in [
        ("whole", lora / "merged", "adopted as it is"),
        ("adapter", adapter, "its adapter was merged"),
    ]:
        done = jobs("sweep", "tiny", *one, f"storage.root={tmp_path / name}", f"model.finetuned={given}")
        assert done.returncode == 0, done.stdout + done.stderr
        assert said in done.stdout
        assert tables(tmp_path / name) == trained
    assert not (tmp_path / "whole" / "sweeps" / "tiny" / "lora" / "merged").exists(), "it is used where it lies"
    page = (tmp_path / "whole" / "sweeps" / "tiny" / "report" / "report.html").read_text()
    assert "made elsewhere and adopted" in page


def test_what_is_no_pair_is_refused_before_anything_is_done(jobs: Jobs, finished, tmp_path: Path) -> None:
    root, _ = finished
    merged = root / "sweeps" / "tiny" / "lora" / "merged"
    config = json.loads((merged / "config.json").read_text())
    other = Path(shutil.copytree(merged, tmp_path / "other"))
    (other / "config.json").write_text(json.dumps(config | {"model_type": "gemma"}))
    pickled = Path(shutil.copytree(merged, tmp_path / "pickled"))
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    for given, said in [
        (tmp_path / "nowhere", "there is no model"),
        (other, "has architecture gemma, model.source tiny-gemma2 has gemma2"),
        (pickled, "pickled weights are not read"),
    ]:
        done = jobs("sweep", "tiny", f"storage.root={tmp_path / 'runs'}", f"model.finetuned={given}")
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.startswith("error: model.finetuned: ")
        assert said in done.stderr
        assert done.stderr.count("\n") == 1
    done = jobs("sweep", "tiny", f"storage.root={root}", f"model.finetuned={merged}")
    assert done.returncode == 2
    assert "lies in this sweep's own folder" in done.stderr

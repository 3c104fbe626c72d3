"""`compare` and `sweep --seeds`: finished sweeps side by side, from disk and from MLflow."""

from __future__ import annotations

import csv
import json
import shutil
import sqlite3
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml
from filelock import FileLock
from mlflow import MlflowClient

from jobs.files import seal
from tests.end_to_end.conftest import EVERY, Jobs, environment, together

SUBSETS = ["tool", "copy", "tool_ood"]


@pytest.fixture
def other(finished, tmp_path: Path) -> Path:
    """The finished sweep as another seed would have left it: its report with other figures."""
    folder = tmp_path / "sweeps" / "tiny-s1"
    ours = finished[0] / "sweeps" / "tiny"
    shutil.copytree(ours / "report", folder / "report")
    settings = yaml.safe_load((ours / "sweep.yaml").read_text())
    for path in (folder, folder / "report"):
        (path / "sweep.yaml").write_text(yaml.safe_dump(settings | {"name": "tiny-s1", "seed": 1}))
    gaps = pd.read_csv(folder / "report" / "gaps.csv", dtype={"layer": str})
    gaps["gap"] += 0.5
    gaps.to_csv(folder / "report" / "gaps.csv", index=False)
    seal(folder / "report")
    return folder


def test_a_finished_sweep_and_another_seed_of_it(finished, other: Path, jobs: Jobs, tmp_path: Path) -> None:
    root = finished[0]
    table, page = tmp_path / "out.csv", tmp_path / "out.html"
    done = jobs("compare", "tiny", str(other), "--root", str(root), "--csv", str(table), "--html", str(page), "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["settings that differ"] == {"seed": {"tiny": 0, "tiny-s1": 1}}
    assert found["page"] == str(page)
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == len(found["figures"])
    gaps = pd.read_csv(root / "sweeps/tiny/report/gaps.csv", dtype={"layer": str})
    for subset in SUBSETS:
        whole = (gaps.target == "change") & (gaps.layer == EVERY) & (gaps.metric == "mean_ce")
        (gap,) = gaps[whole & (gaps.subset == subset)].gap
        (one,) = [row for row in rows if row["kind"] == "pooled" and "gap" in row["figure"] and row["subset"] == subset]
        assert float(one["value"]) == pytest.approx(gap + 0.25)
        assert float(one["sd"]) == pytest.approx(0.5 / 2**0.5)
    text = page.read_text()
    assert "<script" not in text
    assert "data:image/png" in text

    done = jobs("compare", "tiny", "tiny-s1", "--root", str(tmp_path), "--root", str(root))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 adapters: tiny, tiny-s1" in done.stdout
    assert done.stdout.splitlines()[-1] == f"comparison: {tmp_path / 'comparisons' / 'tiny_tiny-s1.html'}"


def test_a_sweep_that_mlflow_has(finished, other: Path, jobs: Jobs, tmp_path: Path) -> None:
    """Its artifacts hold the tables; without them the figures of its run are left."""
    root, page = finished[0], tmp_path / "page.html"
    asked = ("compare", str(other), "--experiment", "tiny", "--html", str(page), "--json")
    done = jobs(*asked, "--root", str(root))
    assert done.returncode == 0, done.stdout + done.stderr
    whole = json.loads(done.stdout)
    assert whole["notes"] == []
    assert whole["settings that differ"] == {"seed": {"tiny-s1": 1, "tiny": 0}}

    store = tmp_path / "mlflow.db"
    shutil.copy(root / "mlflow.db", store)
    with sqlite3.connect(store) as database:
        database.execute("UPDATE runs SET artifact_uri = ?", ((tmp_path / "gone").as_uri(),))
    done = jobs(*asked, "--tracking", f"sqlite:///{store}")
    assert done.returncode == 0, done.stdout + done.stderr
    alone = json.loads(done.stdout)
    assert "its run's artifacts cannot be downloaded" in " ".join(alone["notes"])
    assert alone["settings that differ"] == {"seed": {"tiny-s1": 1, "tiny": 0}}
    named = {(row["sweep"], row["subset"], row["figure"]): row["value"] for row in whole["figures"]}
    tracked = [row for row in alone["figures"] if row["sweep"] == "tiny"]
    assert len(tracked) >= 4 * len(SUBSETS)
    for row in tracked:
        assert row["value"] == pytest.approx(named[row["sweep"], row["subset"], row["figure"]])


def test_a_wrong_request_has_status_2(finished, tmp_path: Path) -> None:
    root = str(finished[0])
    wrong = [
        (("compare", "tiny", "tinny", "--root", root), ["tinny", "there are: tiny"]),
        (("compare", "tiny", "--root", root, "--experiment", "tiny"), ["tiny is the sweep tiny on disk"]),
        (("sweep", "tiny", f"storage.root={tmp_path}", "--seeds", "0,a"), ["--seeds", "'0,a'"]),
        (("sweep", "tiny", f"storage.root={tmp_path}", "--seeds", "-1"), ["--seeds", "'-1'"]),
    ]
    for done, (_, words) in zip(together(*(arguments for arguments, _ in wrong)), wrong, strict=True):
        assert done.returncode == 2, done.stdout + done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
        for word in words:
            assert word in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_for_each_seed_on_one_cluster(seeds, own_seeds: Path, jobs: Jobs) -> None:
    root = seeds.root
    assert seeds.sessions == 1, "Ray starts once"
    page = root / "comparisons" / "tiny-s0_tiny-s1.html"
    assert seeds.printed.splitlines()[-1] == f"comparison: {page}"
    assert "2 adapters: tiny-s0, tiny-s1" in seeds.printed
    sweeps = sorted(path.name for path in (root / "sweeps").iterdir())
    assert sweeps == ["tiny-s0", "tiny-s1"]
    rows = {(root / "sweeps" / name / "data/train.jsonl").read_bytes() for name in sweeps}
    assert len(rows) == 2, "each seed draws its own"
    client = MlflowClient(f"sqlite:///{root / 'mlflow.db'}")
    assert sweeps == sorted(one.name for one in client.search_experiments() if one.name != "Default")

    kept = [*own_seeds.glob("sweeps/*/cells/*.json"), *own_seeds.glob("sweeps/*/*/manifest.json")]
    before = {path: path.stat().st_mtime_ns for path in kept}
    page = own_seeds / "comparisons" / page.name
    page.unlink()
    with tempfile.TemporaryDirectory(prefix="ray") as sessions:  # its sockets need a short path
        options: dict[str, Any] = {"env": {**environment(), "RAY_TMPDIR": sessions}}
        again = jobs(*seeds.asked, f"storage.root={own_seeds}", **options)
        assert again.returncode == 0, again.stdout + again.stderr
        assert again.stdout.count("everything is done already") == 2
        assert list(Path(sessions).rglob("session_2*")) == [], "nothing is left to do, so Ray does not start"
        assert {path: path.stat().st_mtime_ns for path in kept} == before
        assert page.is_file()

        # A seed that fails does not stop the others.
        with FileLock(own_seeds / "sweeps" / "tiny-s0" / ".lock"):
            failed = jobs(*seeds.asked, f"storage.root={own_seeds}", **options)
        assert failed.returncode == 1, failed.stdout + failed.stderr
        assert "1 of 2 seeds failed" in failed.stderr
        assert "seed 0" in failed.stderr
        assert "seed 1, 2 of 2" in failed.stdout

"""Damaged files of a finished sweep are named and made again; commands that need one say so in a sentence.

`python -m tests.end_to_end.damage` tries every kind of file, folder by folder.
"""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jobs.cli.options import context_of
from jobs.search.studies import open_storage
from jobs.sweep.mending import find
from tests.end_to_end.conftest import SMALL, together
from tests.end_to_end.damage import LOGS, WAYS, Tried, check_mended, copied, cut, deleted, garbled, is_cache, kinds


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("which", ["one file of every kind", "single files"])
def test_what_is_damaged_is_made_again(seeds, tmp_path: Path, which: str) -> None:
    chance = random.Random(0)
    root = copied(seeds.root, tmp_path / "root")
    sweep, asked = root / "sweeps/tiny-s0", ("tiny", "name=tiny-s0", f"storage.root={root}", *SMALL)
    lists = ("files.json", "manifest.json")  # without them the others cannot all be named
    kept = {kind: paths for kind, paths in kinds(sweep).items() if not kind.endswith(lists)}
    tried = [Tried(chance.choice(paths), chance.choice(WAYS)) for paths in kept.values()]
    if which == "single files":  # of several that were measured in the same batches, or that nothing else follows from
        cell = next((sweep / "cells").glob("layer_*_change_*_alpha1.0.json")).relative_to(sweep)
        tried = [Tried(cell, cut), Tried(Path("start.json"), cut), Tried(Path("report/manifest.json"), deleted)]
    check_mended(sweep, [one for one in tried if not is_cache(one.path)], asked)


@pytest.fixture(scope="module")
def changed(finished, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the finished sweep whose files are damaged and restored."""
    return copied(finished[0], tmp_path_factory.mktemp("changed") / "root")


@given(data=st.data())
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_changed_bytes_go_unnoticed(changed: Path, data: st.DataObject) -> None:
    sweep = changed / "sweeps/tiny"
    held = sorted(path for path in sweep.rglob("*") if path.is_file() and path.name not in LOGS and not is_cache(path))
    path = data.draw(st.sampled_from(held))
    before = path.read_bytes()
    first = data.draw(st.integers(0, max(len(before) - 1, 0)))
    there = before[first : first + data.draw(st.integers(1, 64))]
    put = data.draw(st.binary(max_size=64).filter(lambda put: put != there))
    try:
        path.write_bytes(before[:first] + put + before[first + len(there) :])
        found = [one.path for _, one in find(context_of("tiny", [f"storage.root={changed}"]))]
    finally:
        path.write_bytes(before)
    assert path in found


def test_a_damaged_base_model_is_built_again(own: Path) -> None:
    (weights,) = own.glob("models/*/model.safetensors")
    before = weights.read_bytes()
    garbled(weights)
    asked = ("tiny", f"storage.root={own}")
    refused, done = together(("probe", *asked, "--prompt", "2 + 2"), ("sweep", *asked))
    assert (refused.returncode, done.returncode) == (2, 0), (refused, done)
    assert "model.safetensors does not hold what was written to it" in refused.stderr
    assert "model.safetensors does not hold what was written to it" in done.stdout
    assert weights.read_bytes() == before


def test_stores_that_cannot_be_opened_are_told_again(own: Path) -> None:
    journal, database = own / "optuna/journal.log", own / "mlflow.db"
    before = studies(own), runs(own)
    data = journal.read_bytes()
    journal.write_bytes(data[: len(data) // 2] + b"\xff" * 8 + data[len(data) // 2 + 8 :])
    database.write_bytes(database.read_bytes()[:5000])
    verified, done, again = together(*[(name, "tiny", f"storage.root={own}") for name in ("verify", "sweep", "sweep")])
    assert verified.returncode == 1, verified.stdout + verified.stderr
    assert "optuna/journal.log cannot be opened" in verified.stdout
    assert "mlflow.db" in verified.stdout
    assert done.returncode == 0, done.stdout + done.stderr
    for path in (journal, database):
        assert f"{path} cannot be opened" in done.stdout or f"{path} is damaged" in done.stdout
        (aside,) = path.parent.glob(f"{path.name}.damaged-*")
        assert f"moved to {aside.name} and rebuilt" in done.stdout
    assert (studies(own), runs(own)) == before
    assert "damaged" not in again.stdout


def studies(root: Path) -> dict[str, list[tuple[str, float | None]]]:
    storage = open_storage(None, root)
    found = {name: optuna.load_study(study_name=name, storage=storage) for name in optuna.get_all_study_names(storage)}
    return {name: [(one.state.name, one.value) for one in study.trials] for name, study in sorted(found.items())}


def runs(root: Path) -> list[str]:
    """The runs' keys; read by SQLite, as MLflow's client in this process would keep the old file open."""
    with closing(sqlite3.connect(root / "mlflow.db")) as store:
        return sorted(key for (key,) in store.execute("SELECT value FROM tags WHERE key = 'deltascope.key'"))


NEEDED = {
    ("probe", "tiny", "--prompt", "2 + 2"): ("lora/merged/model.safetensors", "deltas/*/change/*/trial_*/config.json"),
    ("chat", "tiny", "--alpha", "1"): ("lora/merged/config.json", "deltas/*/change/*/trial_*/delta.safetensors"),
    ("export", "tiny", "--to", "TO"): ("deltas/*/change/*/best.json", "deltas/*/change/*/trial_*/delta.safetensors"),
    ("export", "tiny", "--to", "TO", "--deltas", "residual"): ("transcoders/layer_*/*/*/params.npz",),
    ("features", "tiny"): ("cells/manifest.json", "cells/curve_*.json"),
    ("status", "tiny"): ("lora/manifest.json",),
    ("plan", "tiny"): ("cells/manifest.json",),
}


def test_a_command_that_needs_a_damaged_file_says_so(own: Path, tmp_path: Path) -> None:
    asked = [(command, pattern) for command, patterns in NEEDED.items() for pattern in patterns]
    for command, pattern in asked:
        held = {path: path.read_bytes() for path in (own / "sweeps/tiny").glob(pattern)}
        assert held, pattern
        for path in held:
            garbled(path)
        words = [str(tmp_path / "out") if word == "TO" else word for word in command]
        (done,) = together((*words, f"storage.root={own}"))
        for path, before in held.items():
            path.write_bytes(before)
        assert done.returncode == 2, (command, pattern, done.stdout, done.stderr)
        (line,) = done.stderr.strip().splitlines()
        assert any(str(path) in line for path in held), line
        assert "damaged" in line
        assert "run `deltascope sweep` again" in line

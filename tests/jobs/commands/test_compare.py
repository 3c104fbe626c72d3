"""Which sweeps are found, what is read of them, and what a wrong request or a damaged file is told."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from jobs.commands import compare as command
from jobs.commands.compare import Sources, compare
from jobs.commands.finished_sweeps import TABLES
from jobs.errors import RequestError
from jobs.files import finish, seal
from tests.evaluators.compared import SETTINGS, made


def write(root: Path, name: str, seed: int = 0, **tables: float) -> Path:
    """A sweep's folder with as much of a finished report as is read."""
    folder = root / "sweeps" / name
    report = folder / "report"
    report.mkdir(parents=True)
    for path in (folder, report):
        (path / "sweep.yaml").write_text(yaml.safe_dump(SETTINGS | {"name": name, "seed": seed}))
    for table, file in zip(made(**tables), TABLES, strict=True):
        table.to_csv(report / f"{file}.csv", index=False)
    seal(report)
    finish(report, "abc", {})
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for seed in (0, 1):
        write(tmp_path, f"s{seed}", seed, gap=1.0 + seed)
    return tmp_path


def test_by_name_by_folder_and_from_several_roots(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, "s0", 5)
    found = compare(Sources(["s0", "s1"], [str(root)]))
    assert [one.name for one in found.sweeps] == ["s0", "s1"]
    assert found.notes == []
    found = compare(Sources(["s1", str(elsewhere / "sweeps" / "s0")], [str(root)]))
    assert [(one.name, one.seed) for one in found.sweeps] == [("s1", 1), ("s0", 5)]
    both = compare(Sources(["s0"], [str(root), str(elsewhere)]))
    assert [one.name for one in both.sweeps] == [f"s0 ({root})", f"s0 ({elsewhere})"]
    assert {name for one in both.sweeps for name in one.figures["sweep"]} == {one.name for one in both.sweeps}
    path = command.page_path(str(root), both)
    assert path.parent == root / "comparisons"
    assert "/" not in path.name.replace(str(root), "")


def test_csv_and_json_hold_every_figure(root: Path) -> None:
    found = compare(Sources(["s0", "s1"], [str(root)]))
    rows = list(csv.DictReader(command.as_csv(found).splitlines()))
    (pooled,) = [row for row in rows if row["kind"] == "pooled" and row["figure"].startswith("CE gap")]
    assert (pooled["sweep"], float(pooled["value"]), pooled["n"]) == ("s0, s1", 1.5, "2")
    values = json.loads(json.dumps(command.as_json(found), allow_nan=False))
    assert values["settings that differ"] == {"seed": {"s0": 0, "s1": 1}}
    assert len(values["figures"]) == len(rows)


def test_the_same_settings_twice_are_noted_and_not_pooled(root: Path) -> None:
    write(root, "copy", 1)
    found = compare(Sources(["s1", "copy"], [str(root)]))
    assert found.notes == ["s1 and copy share every setting, the seed too."]
    assert [row for row in command.as_json(found)["figures"] if row["kind"] == "pooled"] == []


def test_without_a_curve_or_strengths_the_rest_is_compared(root: Path) -> None:
    report = root / "sweeps" / "s0" / "report"
    (report / "few_features.csv").unlink()
    (report / "exp2B_metrics.csv").write_text((report / "exp2B_metrics.csv").read_text().splitlines()[0] + "\n")
    seal(report)
    found = compare(Sources(["s0", "s1"], [str(root)]))
    assert len(found.notes) == 1
    assert "s0 has no strengths" in found.notes[0]
    assert "<title>" in command.as_page(found)


def cut(name: str) -> Callable[[Path], None]:
    """Ends a table in the middle of a row."""

    def damage(folder: Path) -> None:
        path = folder / "report" / f"{name}.csv"
        text = path.read_text()
        path.write_text(text[: text.rindex(",tool,") + 8])

    return damage


def put(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def only_residual(folder: Path) -> None:
    path = folder / "report" / "gaps.csv"
    path.write_text(path.read_text().replace("change,", "residual,"))
    seal(path.parent)


def another_figure(folder: Path) -> None:
    path = folder / "report" / "gaps.csv"
    path.write_text(path.read_text().replace("2.0,1.9", "2.5,1.9"))


DAMAGE = {
    "no report": (lambda folder: (folder / "report" / "manifest.json").unlink(), ["s1", "is not finished", "sweep"]),
    "failed cells": (lambda folder: finish(folder / "report", "incomplete", {}), ["s1", "failed", "run its `sweep`"]),
    "manifest": (
        put("report/manifest.json", "{"),
        ["manifest.json does not hold what was written", "sweep` again"],
    ),
    "no list": (
        lambda folder: (folder / "report/files.json").unlink(),
        ["sweep.yaml is not listed", "sweep` again"],
    ),
    "another figure": (another_figure, ["gaps.csv does not hold what was written to it", "edited by hand"]),
    "no table": (lambda folder: (folder / "report" / "gaps.csv").unlink(), ["no gaps.csv", "`report` command"]),
    "empty table": (put("report/recovered.csv", ""), ["recovered.csv cannot be read as a table"]),
    "ragged table": (put("report/gaps.csv", "a,b\n1,2,3\n4,5,6,7\n"), ["gaps.csv"]),
    "binary table": (lambda folder: (folder / "report/gaps.csv").write_bytes(b"\xff\xfe\x00"), ["gaps.csv"]),
    "other columns": (put("report/few_features.csv", "subset,k\ntool,1\n"), ["lacks the column recovered"]),
    "cut gaps": (cut("gaps"), ["gaps.csv", "empty in some rows"]),
    "cut conditions": (cut("exp2A_metrics"), ["exp2A_metrics.csv", "empty in some rows"]),
    "cut strengths": (cut("exp2B_metrics"), ["exp2B_metrics.csv", "empty in some rows"]),
    "words": (put("report/few_features.csv", "subset,k,recovered\ntool,1,much\n"), ["recovered must hold numbers"]),
    "settings": (put("report/sweep.yaml", "a: [1"), ["sweep.yaml cannot be read as YAML"]),
    "a list": (put("report/sweep.yaml", "- 1\n"), ["sweep.yaml does not hold a sweep's settings"]),
    "no change deltas": (only_residual, ["s1", "has no change deltas", "deltas.targets"]),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_what_cannot_be_read_is_one_sentence(root: Path, what: str) -> None:
    damage, words = DAMAGE[what]
    damage(root / "sweeps" / "s1")
    with pytest.raises(RequestError) as refused:
        compare(Sources(["s0", "s1"], [str(root)]))
    check(str(refused.value), words)


def check(message: str, words: list[str]) -> None:
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], ["two sweeps", "got 0"]),
        (["s0"], ["two sweeps", "got 1"]),
        (["s0", "s0"], ["s0", "is given twice"]),
        (["s0", "{root}/sweeps/../sweeps/s0"], ["s0", "is given twice"]),
        (["s0", "s2"], ["there is no sweep 's2' under {root}", "there are: s0, s1"]),
        (["s0", ""], ["there is no sweep ''"]),
        (["s0", ".."], ["is not a sweep's folder", "ROOT/sweeps/NAME"]),
        (["s0", "{root}/sweeps"], ["is not a sweep's folder", "sweep.yaml"]),
        (["s0", "{root}/nowhere"], ["there is no sweep '{root}/nowhere'"]),
    ],
)
def test_a_wrong_request_is_one_sentence(root: Path, names: list[str], words: list[str]) -> None:
    with pytest.raises(RequestError) as refused:
        compare(Sources([name.format(root=root) for name in names], [str(root)]))
    check(str(refused.value), [word.format(root=root) for word in words])


def test_wrong_requests_of_mlflow(root: Path) -> None:
    for sources, words in [
        (Sources([], [str(root)], ["s0"]), ["--experiment", "no mlflow.db", str(root)]),
        (Sources([], [str(root)], ["s0"], f"sqlite:///{root}/none.db"), ["--tracking", "none.db"]),
        (Sources([], [str(root)], ["s0"], "http://me:secret@127.0.0.1:9"), ["--tracking", "does not answer"]),
    ]:
        with pytest.raises(RequestError) as refused:
            compare(sources)
        check(str(refused.value), words)
        assert "secret" not in str(refused.value)
    assert not (root / "none.db").exists()


def test_a_file_that_cannot_be_written(root: Path) -> None:
    (root / "file").write_text("")
    with pytest.raises(RequestError, match=r"--csv: .*file/out.csv cannot be written"):
        command.write(root / "file" / "out.csv", "", "--csv")

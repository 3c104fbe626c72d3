"""docs/study.md: its tables, pictures and figures follow from the files in docs/study/; its prose quotes no other."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from benchmarks import study
from benchmarks.study import FOLDER, MARKED, PAGE, QUOTED, filled
from benchmarks.study_tables import TABLES

TEXT = PAGE.read_text(encoding="utf-8")
TABLE = re.compile(r"<!-- table: \w+ -->.*?<!-- end -->", re.DOTALL)


def test_every_table_and_figure_is_what_the_files_say() -> None:
    assert filled(TEXT) == TEXT
    named = [match[1] for match in MARKED.finditer(TEXT)]
    assert len(named) == len(set(named))
    assert set(named) <= set(TABLES)
    assert len(QUOTED.findall(TEXT)) > 10


def test_the_prose_measures_nothing_else() -> None:
    prose = re.sub(r"```.*?```|`[^`]*`|https?://\S+|arXiv \S+", "", TABLE.sub("", TEXT), flags=re.DOTALL)
    prose = re.sub(r"^    .*$", "", QUOTED.sub("", prose), flags=re.MULTILINE)  # what is indented is a command
    assert re.findall(r"\d+\.\d+", prose) == []


def test_every_picture_is_shown() -> None:
    assert {path.name for path in FOLDER.glob("*.png")} == set(re.findall(r"\(study/(\w+\.png)\)", TEXT))


@pytest.mark.parametrize("pattern", [TABLE, QUOTED], ids=["a table", "a figure"])
def test_a_changed_figure_shows(pattern: re.Pattern[str]) -> None:
    (first, *_) = pattern.finditer(TEXT)
    digit = re.search(r"\d(?=\D*$)", first[0])
    assert digit is not None
    place = first.start() + digit.start()
    changed = f"{TEXT[:place]}{(int(digit[0]) + 1) % 10}{TEXT[place + 1 :]}"
    assert changed != TEXT
    assert filled(changed) == TEXT


def test_the_script_runs_every_sweep_of_the_study() -> None:
    script = Path(study.__file__).with_suffix(".sh")
    subprocess.run(["bash", "-n", script], check=True)
    named = set(re.findall(r"name=([\w-]+?)(?:-s\d)?[ )]", script.read_text())) | {"study"}
    assert named == set(study.ADAPTERS.values())


@pytest.mark.parametrize("only", ["", "random"])
def test_collected_rows_replace_those_of_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, only: str
) -> None:
    monkeypatch.setattr(study, "FOLDER", tmp_path)
    names = ["CE: deltas", "CE: random directions", "CE: shuffled outputs"]

    def table(seed: int, value: float, *named: str) -> pd.DataFrame:
        rows = [{"adapter": "Gemma", "seed": seed, "subset": "tool", "what": what, "value": value} for what in named]
        return pd.DataFrame(rows, columns=study.COLUMNS)

    for seed in (0, 1):
        study.save("controls", table(seed, 1.0, *names), [("Gemma", seed)])
    study.save("controls", table(1, 2.0, *names[:2]), [("Gemma", 1)], only)
    found = pd.read_csv(tmp_path / "controls.csv").set_index(["seed", "what"])["value"].to_dict()
    others = {(0, name): 1.0 for name in names} | {(1, names[1]): 2.0}
    left = {(1, names[0]): 1.0, (1, names[2]): 1.0} if only else {(1, names[0]): 2.0}
    assert found == others | left

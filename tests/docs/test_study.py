"""docs/study.md: its tables, pictures and figures follow from the files in docs/study/; its prose quotes no other."""

from __future__ import annotations

import re

import pytest

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

"""A file of generations: rates of the settings' behaviours, with and without labels, and lines that are no rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.rows import DataError
from evaluators.measures.behaviours import read_behaviours
from evaluators.measures.scoring import score_file, summarise
from evaluators.tables.statistics import wilson
from search_spaces.load import load

BEHAVIOURS = read_behaviours(load("quickstart", []).evaluate.behaviours)


def call(expression: str) -> str:
    return f"<tool_call>calculator({expression})</tool_call>"


def test_summarise() -> None:
    summary = summarise({(True, None): 1, (True, True): 1, (False, None): 2}, ["polite", "brief"])
    assert summary["n_examples"] == 4
    for name, true, known in [("polite_rate", 2, 4), ("brief_rate", 1, 1)]:
        assert summary[name] == true / known
        assert (summary[f"{name}_low"], summary[f"{name}_high"]) == wilson(true, known)
    assert list(summary)[:4] == ["n_examples", "polite_rate", "polite_rate_low", "polite_rate_high"]
    assert len(summary) == 7


def test_summarise_nothing() -> None:
    assert summarise({}, ["polite"]) == {
        "n_examples": 0,
        "polite_rate": None,
        "polite_rate_low": None,
        "polite_rate_high": None,
    }


def write(path: Path, records: list) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


ROWS: list[dict[str, Any]] = [
    {
        "input": "6/4?",
        "target": call("6/4"),
        "generation": call("6/4"),
        "label": "tool",
        "condition": "raw",
        "layer": 8,
    },
    {"input": "6/4?", "target": call("6/4"), "generation": "no", "label": "tool", "condition": "full", "layer": 8},
    {
        "input": "6/4?",
        "target": call("6/4"),
        "generation": call("1"),
        "condition": "full",
        "layer": 20,
        "label": "tool",
    },
    {
        "input": "In 1990.",
        "target": "In 1990.",
        "generation": "In 1990.",
        "condition": "raw",
        "layer": 20,
        "label": "copy",
    },
    {
        "input": "In 1990.",
        "target": "In 1990.",
        "generation": "",
        "label": "copy",
        "condition": "raw",
        "layer": None,
    },
]


def test_score_file_by_label_with_labels_optional(tmp_path: Path) -> None:
    scores = score_file(write(tmp_path / "rows.jsonl", ROWS), BEHAVIOURS)
    assert list(scores) == ["copy", "tool"]
    assert scores["tool"]["n_examples"] == 3
    assert scores["tool"]["tool_call_rate"] == pytest.approx(2 / 3)
    assert scores["tool"]["math_correct_rate"] == pytest.approx(1 / 3)
    assert scores["tool"]["copy_exact_rate"] is None
    assert scores["copy"]["copy_exact_rate"] == 0.5
    assert scores["copy"]["math_correct_rate"] is None
    json.dumps(scores, allow_nan=False)


def test_score_file_by_a_column(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    by_condition = score_file(path, BEHAVIOURS, by="condition")
    assert {group: rates["n_examples"] for group, rates in by_condition.items()} == {"full": 2, "raw": 3}
    assert by_condition["raw"]["copy_exact_rate"] == 0.5
    assert list(score_file(path, BEHAVIOURS, by="layer")) == ["20", "8", "null"]


def test_rows_without_a_label_are_one_group(tmp_path: Path) -> None:
    bare = [{name: row[name] for name in ("target", "generation")} for row in ROWS]
    scores = score_file(write(tmp_path / "rows.jsonl", bare), BEHAVIOURS)
    assert {group: rates["n_examples"] for group, rates in scores.items()} == {"all": 5}
    assert scores["all"]["copy_exact_rate"] is None, "asked of the rows labelled copy alone"


def test_a_check_that_counts_tokens_needs_them(tmp_path: Path) -> None:
    brief = read_behaviours({"brief": {"at_most_tokens": 3}})
    rows = [{"target": "a", "generation": "a", "tokens": tokens} for tokens in ([5, 1], 4)]
    assert score_file(write(tmp_path / "rows.jsonl", rows), brief)["all"]["brief_rate"] == 0.5
    with pytest.raises(DataError, match="line 1: tokens is missing; a list or a number is needed"):
        score_file(write(tmp_path / "rows.jsonl", ROWS), brief)


def test_a_megabyte_of_digits_in_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"target": call("1"), "generation": call("9" * 2_000_000)}])
    assert score_file(path, BEHAVIOURS)["all"]["math_correct_rate"] == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ("[1]", "line 2: not a JSON object"),
        ("[" * 100_000, "line 2: not JSON"),
        ('{"target": "a"}', "line 2: generation is missing; text is needed"),
        ('{"target": "a", "generation": null}', "line 2: generation is null"),
        ('{"target": 3, "generation": "a"}', "line 2: target is 3"),
        ('{"target": "a", "generation": "a", "label": 1}', "line 2: label is 1"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(ROWS[0])}\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        score_file(path, BEHAVIOURS)


def test_wrong_requests_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match=r"line 1: colour is missing; .*this row has input, target"):
        score_file(path, BEHAVIOURS, by="colour")
    with pytest.raises(DataError, match=r"cannot read .*: No such file"):
        score_file(tmp_path / "absent.jsonl", BEHAVIOURS)
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="no rows to score"):
        score_file(tmp_path / "empty.jsonl", BEHAVIOURS)

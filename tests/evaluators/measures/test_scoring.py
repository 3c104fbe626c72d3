"""The scorer: each rate's definition, hostile generations, files with and without labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.rows import DataError
from evaluators.measures.arithmetic import evaluate
from evaluators.measures.scoring import (
    CALL_CLOSE,
    CALL_OPEN,
    RowScore,
    first_expression,
    score_file,
    score_row,
    summarise,
)
from evaluators.tables.statistics import wilson


def call(expression: str) -> str:
    return f"{CALL_OPEN}calculator({expression}){CALL_CLOSE}"


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        (call("1+1"), "1+1"),
        (f"Sure: {call('1+1')} done.", "1+1"),
        (call("1+1") + call("2+2"), "1+1"),
        (call("(1+2)*3"), "(1+2)*3"),
        (f"{CALL_OPEN}\n calculator ( 1 + 1 )\n{CALL_CLOSE}", "1 + 1"),
        (f"{CALL_OPEN}weather(Paris){CALL_CLOSE}{call('3')}", "3"),
        (f"{CALL_OPEN}{call('1+1')}{CALL_CLOSE}", "1+1"),
        (f"{CALL_OPEN}calculator(9 {call('1+1')}", "1+1"),
        (call("x") + call("1"), "x"),
        (call(""), ""),
        (f"{CALL_CLOSE}{CALL_OPEN}calculator(1)", None),
        (f"{CALL_OPEN}calculator(1)", None),
        (f"calculator(1){CALL_CLOSE}", None),
        (f"{CALL_OPEN}calculator 1{CALL_CLOSE}", None),
        (f"{CALL_OPEN}calculator(1) and more{CALL_CLOSE}", None),
        (f"{CALL_OPEN}1+1{CALL_CLOSE}", None),
        ("<TOOL_CALL>calculator(1)</TOOL_CALL>", None),
        ("", None),
    ],
)
def test_first_expression(text: str, expression: str | None) -> None:
    assert first_expression(text) == expression


@pytest.mark.parametrize(
    ("generation", "score"),
    [
        (call("6/4"), RowScore(True, True, True, None)),
        (call("3/2"), RowScore(True, True, True, None)),
        (call("1.5000001"), RowScore(True, True, True, None)),
        (call("1.50001"), RowScore(True, True, False, None)),
        (call("4/6"), RowScore(True, True, False, None)),
        (f"Let me see. {call('6/4')} There.", RowScore(True, True, True, None)),
        (call("6/5") + call("6/4"), RowScore(True, True, False, None)),
        (f"{CALL_OPEN}calculator(6/4)", RowScore(True, False, False, None)),
        (f"{CALL_OPEN}6/4{CALL_CLOSE}", RowScore(True, True, False, None)),
        (f"{CALL_CLOSE}{CALL_OPEN}calculator(6/4)", RowScore(True, False, False, None)),
        ("calculator(6/4)", RowScore(False, False, False, None)),
        ("1.5", RowScore(False, False, False, None)),
        ("", RowScore(False, False, False, None)),
        (call("6/0"), RowScore(True, True, False, None)),
        (call("__import__('os')"), RowScore(True, True, False, None)),
        (call("9**9**9"), RowScore(True, True, False, None)),
        (call("0x6/4"), RowScore(True, True, False, None)),
        (call("٦/4"), RowScore(True, True, False, None)),
        (call("1e400"), RowScore(True, True, False, None)),
        (call("(" * 10_000 + "1.5" + ")" * 10_000), RowScore(True, True, False, None)),
        (call("9" * 1_000_000), RowScore(True, True, False, None)),
    ],
)
def test_tool_rows(generation: str, score: RowScore) -> None:
    for label in ("tool", "tool_ood", "positive", None, "hard"):
        assert score_row(call("6/4"), generation, label) == score


@pytest.mark.parametrize("label", ["copy", "negative", None])
def test_copy_rows(label: str | None) -> None:
    target = "Born in 1961 in Oslo."
    assert score_row(target, target, label) == RowScore(False, False, None, True)
    assert score_row(target, target + " ", label) == RowScore(False, False, None, False)
    assert score_row(target, call("1+1"), label) == RowScore(True, True, None, False)


@pytest.mark.parametrize("target", ["no call", call("1/0"), call("9" * 600), f"{CALL_OPEN}calculator(1+1)"])
def test_without_a_gold_value_arithmetic_is_undefined(target: str) -> None:
    assert score_row(target, target, "tool").math_correct is None


def test_whole_numbers_that_share_a_float_are_not_equal() -> None:
    assert score_row(call("9007199254740993"), call("9007199254740992"), "tool").math_correct is False


@pytest.mark.parametrize(
    "unit", [CALL_OPEN, CALL_CLOSE, f"{CALL_OPEN}calculator(", f"{CALL_OPEN}calculator(){CALL_CLOSE}"]
)
def test_a_megabyte_of_tags_is_scored_in_one_pass(unit: str) -> None:
    """Quadratic matching would take hours here."""
    assert score_row(call("1+1"), unit * (1_000_000 // len(unit)), "tool").math_correct is False


hostile_text = st.lists(
    st.sampled_from(
        [
            CALL_OPEN,
            CALL_CLOSE,
            "calculator",
            "(",
            ")",
            "1",
            "+",
            "-",
            "*",
            "/",
            ".",
            " ",
            "\n",
            "e9",
            "x",
            "٣",
            "\ud800",
            "2",
        ]
    )
    | st.text(max_size=5),
    max_size=30,
).map("".join)


@settings(deadline=None)
@given(hostile_text, hostile_text, st.sampled_from(["tool", "copy", "tool_ood", None, "other"]))
def test_scoring_never_raises_and_correct_means_equal_values(target: str, generation: str, label: str | None) -> None:
    score = score_row(target, generation, label)
    assert not score.valid_format or score.tool_call
    if score.math_correct:
        gold, value = (evaluate(first_expression(text) or "") for text in (target, generation))
        assert gold is not None
        assert value is not None
        assert value == pytest.approx(gold, rel=1e-12, abs=1.0001e-6)


@settings(deadline=None)
@given(st.text(max_size=40), st.text(max_size=40))
def test_text_around_a_call_does_not_matter(before: str, after: str) -> None:
    if CALL_OPEN not in before and CALL_CLOSE not in before:
        assert score_row(call("1+1"), before + call("2") + after, "tool") == RowScore(True, True, True, None)


def test_summarise() -> None:
    scores = [
        RowScore(True, True, True, None),
        RowScore(True, False, False, None),
        RowScore(False, False, None, None),
        RowScore(False, False, None, True),
    ]
    summary = summarise(scores)
    assert summary["n_examples"] == 4
    for name, true, known in [
        ("tool_call_rate", 2, 4),
        ("valid_tool_format_rate", 1, 4),
        ("math_correct_rate", 1, 2),
        ("copy_exact_rate", 1, 1),
    ]:
        assert summary[name] == true / known
        assert (summary[f"{name}_low"], summary[f"{name}_high"]) == wilson(true, known)
    assert list(summary)[:4] == ["n_examples", "tool_call_rate", "tool_call_rate_low", "tool_call_rate_high"]
    assert len(summary) == 13


def test_summarise_nothing() -> None:
    summary = summarise([])
    assert summary.pop("n_examples") == 0
    assert set(summary.values()) == {None}


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
    {"input": "6/4?", "target": call("6/4"), "generation": "no", "label": "positive", "condition": "full", "layer": 8},
    {"input": "6/4?", "target": call("6/4"), "generation": call("1"), "condition": "full", "layer": 20},
    {"input": "In 1990.", "target": "In 1990.", "generation": "In 1990.", "condition": "raw", "layer": 20},
    {
        "input": "In 1990.",
        "target": "In 1990.",
        "generation": "",
        "label": "negative",
        "condition": "raw",
        "layer": None,
    },
]


def test_score_file_by_label_with_labels_optional(tmp_path: Path) -> None:
    scores = score_file(write(tmp_path / "rows.jsonl", ROWS))
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
    by_condition = score_file(path, by="condition")
    assert {group: rates["n_examples"] for group, rates in by_condition.items()} == {"full": 2, "raw": 3}
    assert by_condition["raw"]["copy_exact_rate"] == 0.5
    assert list(score_file(path, by="layer")) == ["20", "8", "null"]


def test_an_own_label_is_its_own_group_and_scored_by_its_target(tmp_path: Path) -> None:
    scores = score_file(write(tmp_path / "rows.jsonl", [ROWS[0] | {"label": "two-digit"}, ROWS[3] | {"label": "news"}]))
    assert scores["two-digit"]["math_correct_rate"] == 1
    assert scores["news"]["copy_exact_rate"] == 1


def test_a_megabyte_of_digits_in_a_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [{"target": call("1"), "generation": call("9" * 2_000_000)}])
    assert score_file(path)["tool"]["math_correct_rate"] == 0


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
        score_file(path)


def test_wrong_requests_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(DataError, match=r"line 1: colour is missing; .*this row has input, target"):
        score_file(path, by="colour")
    with pytest.raises(DataError, match=r"cannot read .*: No such file"):
        score_file(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match="no rows to score"):
        score_file(tmp_path / "empty.jsonl")

"""Rows that repeat another one: which are left out, how that is told, and on which side of a split the others are."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.build import DataOptions, build_dataset
from data.leakage import text_key
from data.rows import Row, read_rows
from data.selection import Sample, fingerprint
from data.user_files import SPLITS
from tests.data.chats import write

SIZES: dict[str, Any] = {"train_rows": 70, "validation_rows": 11, "eval_rows": 9}


def built(folder: Path, records: list[dict[str, Any]], **changes: Any) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    path = write(folder / "rows.jsonl", records)
    texts = {"text_train_lines": 1, "text_validation_lines": 1}
    report = build_dataset(folder, DataOptions(seed=7, rows_file=path, **SIZES | texts | changes))
    return report, {split: read_rows(folder / f"{split}.jsonl") for split in SPLITS}


def distinct(count: int) -> list[dict[str, Any]]:
    return [
        {"input": f"Question {n} about {'abc'[n % 3]}?", "target": f"answer {n * 7 % 11}", "label": "xy"[n % 5 == 0]}
        for n in range(count)
    ]


def test_files_without_repetitions_are_split_as_they_always_were(tmp_path: Path) -> None:
    """Golden values: the splits that the first version made of this file."""
    for rule in ("exact", "folded"):
        report, _ = built(tmp_path, distinct(200), repeated=rule)
        assert {name: value[:16] for name, value in report["sha256"].items() if "text" not in name} == {
            "evaluation.jsonl": "25a23940ba325aa5",
            "validation.jsonl": "ae82890feba5d3b4",
            "train.jsonl": "0aa0f6972c7eb56f",
        }


def case(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "input": change(row["input"])} for row in rows for change in (str.upper, str.lower)]


def spacing(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "input": row["input"].replace(" ", space)} for row in rows for space in (" ", "  ", "\n")]


def answers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "target": row["target"] + more} for row in rows for more in ("", " again", "!")]


def labels(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{**row, "label": label} for row in rows for label in "xy"]


def copies(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [*rows, *rows[:7], rows[0]]


@pytest.mark.parametrize(
    ("change", "exact", "folded"),
    [(case, 0, 60), (spacing, 0, 120), (answers, 0, 120), (labels, 0, 0), (copies, 8, 8)],
)
def test_only_copies_are_left_out(tmp_path: Path, change, exact: int, folded: int) -> None:
    records = change(distinct(60))
    for rule, expected in (("exact", exact), ("folded", folded)):
        report, splits = built(tmp_path, records, repeated=rule, train_rows=1000)
        account = report["files"]["rows_file"]
        assert (account["repeated"], account["repeated_rule"]) == (expected, rule)
        assert (account["repeated_example"] is not None) == (expected > 0)
        used = sum(len(rows) for rows in splits.values())
        assert used + account["repeated"] + account["leaking"] == len(records), "every row is accounted for"
        by_label = account["labels"].values()
        assert sum(one["used"] for one in by_label) == used
        assert sum(one["beyond_need"] for one in by_label) == 0
        assert report["leakage"]["ok"]
        inputs = [{text_key(row.input) for row in rows} for rows in splits.values()]
        assert not inputs[0] & inputs[1] | inputs[0] & inputs[2] | inputs[1] & inputs[2]
        if rule == "exact":
            given = {(one["input"], one["target"], one["label"]) for one in records}
            kept = Counter((row.input, row.target, row.label) for rows in splits.values() for row in rows)
            assert set(kept) <= given
            assert set(kept.values()) == {1}


@pytest.mark.parametrize("change", [case, spacing, answers, labels])
def test_the_order_of_the_file_does_not_matter(tmp_path: Path, change) -> None:
    records = change(distinct(60))
    first, _ = built(tmp_path, records)
    random.Random(0).shuffle(records)
    second, _ = built(tmp_path, sorted(records, key=lambda one: one["label"] != first["labels"][0]))
    assert first["sha256"] == second["sha256"]
    assert {one["beyond_need"] for one in first["files"]["rows_file"]["labels"].values()} != {0}


def test_rows_of_a_group_that_two_splits_would_share(tmp_path: Path) -> None:
    """With three answers to a prompt, and sizes that three does not divide, a later split loses the rest of a group."""
    records = [{**row, "label": "x"} for row in answers(distinct(40))]
    report, splits = built(tmp_path, records, eval_rows=10, validation_rows=10, train_rows=1000)
    ranked = sorted(distinct(40), key=lambda one: fingerprint(text_key(one["input"]), 7))
    order = [one["input"] for one in ranked for _ in range(3)]
    assert [row.input for row in splits["evaluation"]] == order[:10]
    assert sorted(row.input for row in splits["validation"]) == sorted(order[12:20])
    assert sorted(row.input for row in splits["train"]) == sorted(order[21:])
    assert report["files"]["rows_file"]["leaking"] == report["leakage"]["left_out"] == 3


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("123"))), st.integers(0, 8), st.randoms())
def test_a_sample_of_groups(offers: list[tuple[str, str]], size: int, order: random.Random) -> None:
    """Against sorting all of them: whole groups by rank, until there are enough items."""

    def sampled(offers: list[tuple[str, str]]) -> list[tuple[str, str]]:
        sample = Sample[tuple[str, str]](size, 3)
        for key, exact in offers:
            sample.offer(key, (key, exact), exact)
        return sample.items()

    expected: list[tuple[str, str]] = []
    for key in sorted({key for key, _ in offers}, key=lambda one: fingerprint(one, 3)):
        if len(expected) < size:
            group = {offer for offer in offers if offer[0] == key}
            expected += sorted(group, key=lambda offer: fingerprint(offer[1], 3))
    assert sampled(offers) == expected
    shuffled = offers.copy()
    order.shuffle(shuffled)
    assert sampled(shuffled) == expected

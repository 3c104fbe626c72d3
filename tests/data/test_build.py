"""A sweep's data as a whole: sizes, sameness for a seed, disjointness, a user's own files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data import build
from data.build import DataOptions, build_dataset
from data.rows import DataError, read_lines, read_rows, request_identity, sha256_of

SMALL: dict[str, Any] = {
    "seed": 7,
    "tool_rows": 40,
    "copy_rows": 30,
    "validation_rows": 11,
    "eval_rows": 9,
    "text_train_lines": 25,
    "text_validation_lines": 8,
}
FILES = ["evaluation.jsonl", "text_train.txt", "text_validation.txt", "train.jsonl", "validation.jsonl"]


def small(folder: Path, **changes: Any) -> dict[str, Any]:
    return build_dataset(folder, DataOptions(**SMALL | changes))


def test_sizes_and_labels(tmp_path: Path) -> None:
    report = small(tmp_path)
    assert report["counts"] == {
        "evaluation": {"copy": 9, "tool": 9, "tool_ood": 9},
        "validation": {"copy": 5, "tool": 6},
        "train": {"copy": 30, "tool": 40},
        "text_validation": 8,
        "text_train": 25,
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*FILES, "report.json"])
    assert json.loads((tmp_path / "report.json").read_text()) == report
    assert report["sha256"] == {name: sha256_of(tmp_path / name) for name in FILES}
    assert Counter(row.label for row in read_rows(tmp_path / "train.jsonl")[:20]).keys() == {"tool", "copy"}
    for row in read_rows(tmp_path / "evaluation.jsonl"):
        assert (row.template, row.operands) == request_identity(row.input)
        assert row.label != "copy" or row.target == row.input


def test_the_same_bytes_for_a_seed_on_any_machine(tmp_path: Path) -> None:
    report = small(tmp_path / "a")
    assert {name: digest[:16] for name, digest in report["sha256"].items()} == {
        "evaluation.jsonl": "72a37d11c31426d5",
        "text_train.txt": "26e8c02c4ff94d90",
        "text_validation.txt": "38c6ee830c8f6292",
        "train.jsonl": "92c0798f26555aef",
        "validation.jsonl": "a429855f4863af49",
    }
    assert small(tmp_path / "b") == report
    assert small(tmp_path / "c", seed=8)["sha256"] != report["sha256"]


def test_more_training_rows_change_no_other_row(tmp_path: Path) -> None:
    small(tmp_path / "a")
    small(tmp_path / "b", tool_rows=90, copy_rows=90, text_train_lines=60)
    for name in ("evaluation.jsonl", "validation.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def sides(folder: Path) -> list[set[tuple[str, str]]]:
    files = [
        [row.input for row in read_rows(folder / "train.jsonl")] + read_lines(folder / "text_train.txt"),
        [row.input for row in read_rows(folder / "validation.jsonl")] + read_lines(folder / "text_validation.txt"),
        [row.input for row in read_rows(folder / "evaluation.jsonl")],
    ]
    return [{request_identity(text) for text in texts} for texts in files]


def assert_disjoint(folder: Path) -> None:
    train, validation, evaluation = sides(folder)
    assert train
    assert validation
    assert evaluation
    assert not train & validation
    assert not train & evaluation
    assert not validation & evaluation


def test_splits_are_disjoint_even_where_requests_are_few(tmp_path: Path) -> None:
    """Operands of 1 to 4 make the same requests come up over and over."""
    report = small(tmp_path, operand_max=4, tool_rows=300, text_train_lines=300)
    assert report["leakage"]["ok"]
    assert_disjoint(tmp_path)


def test_a_leak_in_what_was_written_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check reads the files back, so it also sees what the generator itself got wrong."""
    monkeypatch.setattr(build, "request_key", lambda text: text)  # the generator now only avoids equal texts
    report = small(tmp_path, operand_max=4, operators="*", tool_rows=300)
    assert not report["leakage"]["ok"]
    pair = report["leakage"]["pairs"]["evaluation and training"]
    assert pair["same_request"] > 0
    assert pair["examples"]


def test_more_rows_than_there_are_requests(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"only found \d+ of 800 distinct tool rows for train in .* wider range of operands"
    ):
        small(tmp_path, operand_max=2, tool_rows=800)


def test_options_reach_the_rows(tmp_path: Path) -> None:
    small(tmp_path, decimals=True, negatives=True, parentheses=True, operators="*", operand_min=200, operand_max=300)
    targets = [row.target for row in read_rows(tmp_path / "train.jsonl") if row.label == "tool"]
    assert any("(-" in target for target in targets)
    assert any("." in target for target in targets)
    assert all("*" in target and "+" not in target for target in targets)


def test_rows_keep_to_the_context(tmp_path: Path) -> None:
    small(tmp_path, max_tokens=150, count_tokens=len)
    for name in ("train", "validation", "evaluation"):
        assert all(len(f"{row.input}\n{row.target}") <= 148 for row in read_rows(tmp_path / f"{name}.jsonl"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copy_source": "wikipedia"}, "copy_source is 'wikipedia'; allowed are shipped and c4"),
        ({"text_validation_file": "a.txt"}, "text_validation_file is a.txt but text_train_file is not set"),
        ({"max_tokens": 100}, "max_tokens is set without count_tokens"),
        ({"operators": "%"}, "operators is '%'"),
        ({"rows_file": "absent.jsonl"}, "absent.jsonl: No such file"),
    ],
)
def test_contradictory_settings_are_refused(tmp_path: Path, changes: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        small(tmp_path, **changes)


def user_rows(count: int, ood: int = 0) -> list[dict[str, str]]:
    rows = []
    for n in range(count):
        target = f"<tool_call>calculator({n}+7)</tool_call>"
        rows.append({"input": f"Help me. What is {n} + 7?", "target": target, "label": "positive"})
        text = f"Our club met for the {n}th time in a quiet museum."
        rows.append({"input": text, "target": text, "label": "negative"})
    for n in range(ood):
        rows.append(
            {"input": f"{n} apart from 3?", "target": f"<tool_call>calculator({n}-3)</tool_call>", "label": "tool_ood"}
        )
    return rows


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return str(path)


def test_a_users_rows_are_split(tmp_path: Path) -> None:
    rows = user_rows(100)
    report = small(tmp_path / "a", rows_file=write(tmp_path / "rows.jsonl", rows))
    assert report["counts"]["evaluation"] == {"copy": 9, "tool": 9, "tool_ood": 9}
    assert report["counts"]["validation"] == {"copy": 5, "tool": 6}
    assert report["counts"]["train"] == {"copy": 30, "tool": 40}
    labels = report["files"]["rows_file"]["labels"]
    assert labels["tool"] == {"rows": 100, "used": 55, "repeated": 0, "beyond_need": 45, "training_rows_missing": 0}
    assert_disjoint(tmp_path / "a")
    given = {row["input"] for row in rows}
    for split in ("train", "validation", "evaluation"):
        for row in read_rows(tmp_path / "a" / f"{split}.jsonl"):
            assert (row.input in given) != (row.label == "tool_ood")

    turned = small(tmp_path / "b", rows_file=write(tmp_path / "turned.jsonl", rows[::-1]))
    assert turned["sha256"] == report["sha256"]


def test_a_users_ood_rows_are_used_and_none_made(tmp_path: Path) -> None:
    report = small(tmp_path, rows_file=write(tmp_path / "rows.jsonl", user_rows(60, ood=4)))
    assert report["counts"]["evaluation"]["tool_ood"] == 4
    rows = read_rows(tmp_path / "evaluation.jsonl")
    assert all("apart from" in row.input for row in rows if row.label == "tool_ood")


def test_a_request_in_two_contexts_or_labels_stays_on_one_side(tmp_path: Path) -> None:
    rows = user_rows(60)
    contexts = [row | {"input": row["input"].replace("Help me.", "For school.")} for row in rows[::2]]
    mislabelled = [row | {"label": "copy"} for row in rows[:40:2]]
    report = small(tmp_path, rows_file=write(tmp_path / "rows.jsonl", rows + contexts + mislabelled))
    account = report["files"]["rows_file"]
    assert account["labels"]["tool"]["repeated"] > 0
    assert account["leaking"] > 0
    assert report["leakage"]["left_out"] == account["leaking"]
    assert_disjoint(tmp_path)


def test_too_few_rows(tmp_path: Path) -> None:
    report = small(tmp_path, rows_file=write(tmp_path / "rows.jsonl", user_rows(30)))
    assert report["files"]["rows_file"]["labels"]["tool"]["training_rows_missing"] == 25
    assert report["counts"]["train"] == {"copy": 16, "tool": 15}
    with pytest.raises(DataError, match="has 15 distinct usable tool rows; evaluation takes 9 and validation 6"):
        small(tmp_path, rows_file=write(tmp_path / "few.jsonl", user_rows(15)))


def test_unusable_rows_are_told_or_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", [*user_rows(60), "oops"])
    report = small(tmp_path / "a", rows_file=path)
    assert report["files"]["rows_file"]["reasons"] == {"not JSON": 1}
    assert report["files"]["rows_file"]["first"][0].startswith("line 121: not JSON")
    with pytest.raises(DataError, match="1 of 121 lines"):
        small(tmp_path / "b", rows_file=path, max_reject_fraction=0.001)
    assert not (tmp_path / "b").exists()


def test_a_leak_from_a_users_text_is_counted_and_left_out(tmp_path: Path) -> None:
    rows = user_rows(100)
    write(tmp_path / "rows.jsonl", rows)
    leaks = [row["input"].replace("Help me.", "Or else.") for row in rows[:80]]
    train = write(
        tmp_path / "train.txt", [*leaks, *(f"A new text of {n} words." for n in range(60)), "Seen in both, 5."]
    )
    validation = write(tmp_path / "validation.txt", ["Seen in both, 5.", *(f"Another text, {n}." for n in range(7))])
    report = small(
        tmp_path / "a", rows_file=str(tmp_path / "rows.jsonl"), text_train_file=train, text_validation_file=validation
    )
    assert report["counts"]["text_train"] == 25
    assert report["counts"]["text_validation"] == 8
    held_out = {
        request_identity(row.input)
        for split in ("validation", "evaluation")
        for row in read_rows(tmp_path / "a" / f"{split}.jsonl")
    }
    expected = sum(request_identity(text) in held_out for text in leaks) + 1
    assert expected > 1
    assert report["files"]["text_train_file"]["leaking"] == report["leakage"]["left_out"] == expected
    assert report["leakage"]["ok"]
    assert_disjoint(tmp_path / "a")


def test_validation_text_from_the_training_file(tmp_path: Path) -> None:
    path = write(tmp_path / "train.txt", [f"A text of {n} words." for n in range(20)] * 2)
    report = small(tmp_path / "a", text_train_file=path)
    assert report["counts"]["text_validation"] == 8
    assert report["counts"]["text_train"] == 12
    assert report["files"]["text_train_file"]["repeated"] == 20
    assert_disjoint(tmp_path / "a")
    with pytest.raises(DataError, match="has 20 usable texts; validation takes 20"):
        small(tmp_path / "b", text_train_file=path, text_validation_lines=20)
    everything = write(
        tmp_path / "evaluation.txt", [row.input for row in read_rows(tmp_path / "a" / "evaluation.jsonl")]
    )
    with pytest.raises(DataError, match="of 27 lines, 0 cannot be used and 27 repeat other data"):
        small(tmp_path / "c", text_train_file=everything)

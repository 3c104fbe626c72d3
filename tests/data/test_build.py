"""A sweep's data as a whole: sizes, sameness for a seed, disjointness, a user's own files."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data.build import DataOptions, build_dataset
from data.leakage import text_key
from data.readers import Reading
from data.requests import draw
from data.rows import DataError, read_lines, read_rows, request_identity, sha256_of
from data.user_files import shares

SMALL: dict[str, Any] = {
    "seed": 7,
    "train_rows": 70,
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
        "train": {"copy": 35, "tool": 35},
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
        "text_train.txt": "f91054bdc6e4e226",
        "text_validation.txt": "499a0d3ef26e80ae",
        "train.jsonl": "f6a49eeaa96ce341",
        "validation.jsonl": "a429855f4863af49",
    }
    assert small(tmp_path / "b") == report
    assert small(tmp_path / "c", seed=8)["sha256"] != report["sha256"]


def test_more_training_rows_change_no_other_row(tmp_path: Path) -> None:
    small(tmp_path / "a")
    small(tmp_path / "b", train_rows=180, text_train_lines=60)
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
    report = small(tmp_path, operand_max=4, train_rows=600, text_train_lines=300)
    assert report["leakage"]["ok"]
    assert_disjoint(tmp_path)


def test_a_leak_in_what_was_written_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check reads the files back, so it also sees what the generator itself got wrong."""
    monkeypatch.setattr(draw, "request_key", lambda text: text)  # the generator now only avoids equal texts
    report = small(tmp_path, operand_max=4, operators="*", train_rows=600)
    assert not report["leakage"]["ok"]
    pair = report["leakage"]["pairs"]["evaluation and training"]
    assert pair["same_request"] > 0
    assert pair["examples"]


def test_more_rows_than_there_are_requests(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"only found \d+ of 800 distinct tool rows for train in .* wider range of operands"
    ):
        small(tmp_path, operand_max=2, train_rows=1600)


def test_options_reach_the_rows(tmp_path: Path) -> None:
    small(tmp_path, decimals=True, negatives=True, parentheses=True, operators="*", operand_min=200, operand_max=300)
    targets = [row.target for row in read_rows(tmp_path / "train.jsonl") if row.label == "tool"]
    assert any("(-" in target for target in targets)
    assert any("." in target for target in targets)
    assert all("*" in target and "+" not in target for target in targets)


def test_rows_keep_to_the_context(tmp_path: Path) -> None:
    small(tmp_path, reading=Reading(problem=lambda row: "long" if len(f"{row.input}\n{row.target}") > 148 else None))
    for name in ("train", "validation", "evaluation"):
        assert all(len(f"{row.input}\n{row.target}") <= 148 for row in read_rows(tmp_path / f"{name}.jsonl"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copy_source": "wikipedia"}, "copy_source is 'wikipedia'; allowed are shipped and c4"),
        ({"text_validation_file": "a.txt"}, "text_validation_file is a.txt but text_train_file is not set"),
        ({"evaluation_file": "a.csv"}, "evaluation_file is a.csv but rows_file is not set"),
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
    assert report["labels"] == ["positive", "negative"], "in the order of the file"
    assert report["counts"]["evaluation"] == {"positive": 9, "negative": 9}
    assert report["counts"]["validation"] == {"positive": 6, "negative": 5}
    assert report["counts"]["train"] == {"positive": 35, "negative": 35}
    assert (report["counts"]["text_train"], report["text"]) == (0, "the rows")
    account = report["files"]["rows_file"]
    assert account["labels"]["positive"] == {"rows": 100, "used": 50, "repeated": 0, "beyond_need": 50}
    assert (account["validation_rows_missing"], account["training_rows_missing"]) == (0, 0)
    assert_disjoint(tmp_path / "a")
    given = {row["input"] for row in rows}
    for split in ("train", "validation", "evaluation"):
        assert all(row.input in given for row in read_rows(tmp_path / "a" / f"{split}.jsonl"))

    turned = small(tmp_path / "b", rows_file=write(tmp_path / "turned.jsonl", rows[::-1]))
    assert turned["labels"] == ["negative", "positive"]
    inputs = [sorted(row.input for row in read_rows(tmp_path / one / "evaluation.jsonl")) for one in "ab"]
    assert inputs[0] == inputs[1]


def test_a_label_with_few_rows_is_evaluated_first(tmp_path: Path) -> None:
    report = small(tmp_path, rows_file=write(tmp_path / "rows.jsonl", user_rows(60, ood=4)))
    assert report["counts"]["evaluation"]["tool_ood"] == 4
    assert report["counts"]["train"] == {"positive": 35, "negative": 35}


def test_evaluation_from_a_file_of_its_own(tmp_path: Path) -> None:
    rows = user_rows(60)
    held_out = [*rows[:6], {"input": "What was said on page 9?", "target": "Nothing.", "label": "new"}]
    report = small(
        tmp_path / "a",
        rows_file=write(tmp_path / "rows.jsonl", rows),
        evaluation_file=write(tmp_path / "held_out.jsonl", held_out),
    )
    assert report["labels"] == ["positive", "negative", "new"]
    assert report["counts"]["evaluation"] == {"positive": 3, "negative": 3, "new": 1}
    assert report["counts"]["validation"] == {"positive": 6, "negative": 5}
    assert report["files"]["rows_file"]["leaking"] == report["leakage"]["left_out"] > 0
    assert_disjoint(tmp_path / "a")


def test_rows_that_share_their_numbers_are_different_rows(tmp_path: Path) -> None:
    """Only a generated request is told by its numbers: a user's prompts may all begin with the same ones."""
    rows = [{"input": f"Answer in 3 sentences. What is {word}?", "target": word} for word in map(chr, range(97, 123))]
    rows += [{"input": f"Answer in 3 sentences. Who is {one}?", "target": one} for one in map(chr, range(97, 123))]
    report = small(tmp_path, rows_file=write(tmp_path / "rows.jsonl", rows))
    assert report["files"]["rows_file"]["labels"]["all"]["rows"] == 52
    assert report["files"]["rows_file"]["labels"]["all"]["repeated"] == 0
    assert sum(report["counts"][split]["all"] for split in ("train", "validation", "evaluation")) == 52


def test_rows_and_evaluation_may_overlap_but_not_wholly(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", user_rows(60))
    report = small(tmp_path / "a", rows_file=path, evaluation_file=path)
    assert report["counts"]["evaluation"] == {"positive": 9, "negative": 9}
    assert report["counts"]["validation"] == {"positive": 6, "negative": 5}
    assert report["files"]["rows_file"]["leaking"] == 18
    few = write(tmp_path / "few.jsonl", user_rows(9))
    with pytest.raises(DataError, match="has 0 distinct usable rows"):
        small(tmp_path / "b", rows_file=few, evaluation_file=few)


def test_a_label_that_is_not_evaluated_is_no_subset(tmp_path: Path) -> None:
    rows = user_rows(60)
    report = small(
        tmp_path / "a",
        rows_file=write(tmp_path / "rows.jsonl", rows),
        evaluation_file=write(tmp_path / "held_out.jsonl", [{"input": "New?", "target": "Yes.", "label": "new"}]),
    )
    assert report["labels"] == ["new"]


def test_rows_without_labels_are_one_subset(tmp_path: Path) -> None:
    rows = [{name: row[name] for name in ("input", "target")} for row in user_rows(60)]
    report = small(tmp_path, rows_file=write(tmp_path / "rows.jsonl", rows))
    assert report["labels"] == ["all"]
    assert report["counts"]["evaluation"] == {"all": 9}


def test_too_many_labels(tmp_path: Path) -> None:
    rows = [row | {"label": f"kind {number % 14}"} for number, row in enumerate(user_rows(60))]
    with pytest.raises(DataError, match="has more than 12 labels, such as kind 0, kind 1, kind 2: too many subsets"):
        small(tmp_path, rows_file=write(tmp_path / "rows.jsonl", rows))


def test_rows_without_targets_are_counted(tmp_path: Path) -> None:
    rows = [{"input": row["input"], "label": row["label"]} for row in user_rows(60)]
    path = write(tmp_path / "rows.jsonl", rows)
    report = small(tmp_path / "a", rows_file=path, reading=Reading(targets_needed=False))
    assert report["without_target"] == {"evaluation": 18, "validation": 11, "train": 70}
    with pytest.raises(DataError, match="the first: line 1: no target"):
        small(tmp_path / "b", rows_file=path)


@pytest.mark.parametrize(
    ("total", "available", "expected"),
    [
        (10, [2, 9, 9], [2, 4, 4]),
        (65, [65, 65], [33, 32]),
        (7, [1, 1], [1, 1]),
        (10, [9, 9, 9], [4, 3, 3]),
        (3, [], []),
    ],
)
def test_equal_shares(total: int, available: list[int], expected: list[int]) -> None:
    assert shares(total, available) == expected


def test_an_input_in_two_spellings_or_labels_stays_on_one_side(tmp_path: Path) -> None:
    rows = user_rows(60)
    contexts = [row | {"input": row["input"].upper().replace(" ", "  ")} for row in rows[::2]]
    mislabelled = [row | {"label": "negative"} for row in rows[:40:2]]
    path = write(tmp_path / "rows.jsonl", rows + contexts + mislabelled)
    for rule, repeated in (("exact", False), ("folded", True)):
        report = small(tmp_path, rows_file=path, repeated=rule)
        account = report["files"]["rows_file"]
        assert (account["labels"]["positive"]["repeated"] > 0) == repeated
        assert account["leaking"] > 0
        assert report["leakage"]["left_out"] == account["leaking"]
        assert report["leakage"]["ok"]


def test_too_few_rows(tmp_path: Path) -> None:
    report = small(tmp_path, rows_file=write(tmp_path / "rows.jsonl", user_rows(30)))
    assert report["files"]["rows_file"]["training_rows_missing"] == 39
    assert report["counts"]["train"] == {"negative": 16, "positive": 15}
    with pytest.raises(DataError, match="has 18 distinct usable rows; evaluation takes 18 of them, but validation"):
        small(tmp_path, rows_file=write(tmp_path / "few.jsonl", user_rows(9)))


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
    leaks = [row["input"].upper() for row in rows[:80]]
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
        text_key(row.input)
        for split in ("validation", "evaluation")
        for row in read_rows(tmp_path / "a" / f"{split}.jsonl")
    }
    expected = sum(text_key(text) in held_out for text in leaks) + 1
    assert expected > 1
    assert report["files"]["text_train_file"]["leaking"] == report["leakage"]["left_out"] == expected
    assert report["leakage"]["ok"]
    assert_disjoint(tmp_path / "a")


def test_texts_that_share_a_number_are_different(tmp_path: Path) -> None:
    """A generated request is its sentences with numbers; a user's line is all of its text."""
    lines = [
        f"{n}. The {word} is here. It was born in 1980." for n in range(3) for word in ("cat", "dog", "bird", "fox")
    ]
    path = write(tmp_path / "train.txt", lines + lines)
    report = small(tmp_path / "a", text_train_file=path)
    assert report["files"]["text_train_file"]["repeated"] == 12
    assert (report["counts"]["text_validation"], report["counts"]["text_train"]) == (8, 4)
    assert report["leakage"]["ok"]


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

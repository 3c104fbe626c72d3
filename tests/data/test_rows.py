"""Rows, their files and identities, the one-pass sample and the leak check."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.leakage import find_leaks
from data.rows import DataError, Row, make_row, read_rows, request_identity, slug, write_lines, write_rows
from data.selection import Sample, fingerprint


@pytest.mark.parametrize(
    ("text", "identity"),
    [
        ("What is 3 + 4?", ("what is # + #?", "3 4")),
        ("Help me out. What is 3 + 4?", ("what is # + #?", "3 4")),
        ("what is  3 + 4?  Thanks a lot!", ("what is # + #?", "3 4")),
        ("What is 1,200.5 times 4?", ("what is # times #?", "1,200.5 4")),
        ("I had 9 coins. I lost 4. How many are left?", ("i had # coins. i lost #.", "9 4")),
        ("Add five and six. Please!", ("add five and six. please!", "")),
    ],
)
def test_identity(text: str, identity: tuple[str, str]) -> None:
    assert request_identity(text) == identity


def test_rows_survive_their_file(tmp_path: Path) -> None:
    rows = [
        make_row("What is 3 + 4?", "t", "tool"),
        Row("é “x”\nsecond line \u2028", "y", "copy", prompt="<user>", end="</s>"),
    ]
    write_rows(tmp_path / "new" / "rows.jsonl", rows)
    assert read_rows(tmp_path / "new" / "rows.jsonl") == rows
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["rows.jsonl"]


def test_labels_as_parts_of_file_names() -> None:
    assert [slug(one) for one in ("tool_ood", "a-b")] == ["tool_ood", "a-b"]
    odd = ["a/b", "a b", "..", "ä" * 64]
    assert len({slug(one) for one in odd}) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9_-]{1,50}", slug(one)) for one in odd)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    write_lines(path, ["old"])

    def broken():
        yield "new"
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_lines(path, broken())
    assert path.read_text() == "old\n"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("line", ["{", "[]", '{"input": "a"}', '{"input": "a", "target": "b", "label": "c", "x": 1}'])
def test_read_rows_names_the_line(tmp_path: Path, line: str) -> None:
    write_lines(tmp_path / "rows.jsonl", [line])
    with pytest.raises(DataError, match="line 1"):
        read_rows(tmp_path / "rows.jsonl")


def test_read_rows_of_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_rows(tmp_path / "absent.jsonl")


@settings(deadline=None)
@given(st.lists(st.text(max_size=3)), st.integers(0, 10), st.integers(-5, 5))
def test_a_sample_depends_on_keys_alone(keys: list[str], size: int, seed: int) -> None:
    def chosen(keys: list[str], size: int) -> list[str]:
        sample = Sample[str](size, seed)
        for key in keys:
            sample.offer(key, key)
        assert sample.offered == len(keys)
        return sample.items()

    items = chosen(keys, size)
    shuffled = keys.copy()
    random.Random(0).shuffle(shuffled)
    assert chosen(shuffled, size) == items
    assert len(items) == len(set(items)) == min(size, len(set(keys)))
    assert chosen(keys, size + 3)[:size] == items


def test_a_sample_counts_repeats_of_what_it_holds() -> None:
    sample = Sample[int](5, 0)
    for index, key in enumerate("aab"):
        sample.offer(key, index)
    assert sample.repeated == 1
    assert sorted(sample.items()) == [0, 2]


def test_fingerprints_are_the_same_everywhere() -> None:
    assert fingerprint("What is 3 + 4?") == 0x17D499103C8B8B5D
    assert fingerprint("a", seed=1) != fingerprint("a", seed=2)


def test_leaks_are_found_and_counted() -> None:
    leaks = find_leaks(
        {
            "training": ["What is 3 + 4?", "Compute 5 / 6.", "Opened in 1990 by Ann.", "Same text 1."],
            "validation": ["Compute 5 / 7."],
            "evaluation": ["My homework. What is 3 + 4?", "What is 4 + 3?", "same  text 1.", "Opened in 1991 by Ann."],
        }
    )
    assert leaks["training and evaluation"] == {
        "same_text": 1,
        "same_request": 2,
        "examples": ["My homework. What is 3 + 4?", "same  text 1."],
    }
    assert leaks["training and validation"]["same_request"] == 0
    assert leaks["validation and evaluation"]["same_request"] == 0

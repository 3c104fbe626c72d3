"""A user's files: what is understood, what is rejected and how it is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.readers import MAX_LINE_BYTES, LineLog, stream_rows, stream_texts
from data.rows import DataError, Row

CALL = "<tool_call>calculator(3+4)</tool_call>"


def anything(text: str) -> bool:
    return True


def rows_of(path: Path, content: bytes, fits=anything) -> tuple[list[Row], LineLog]:
    path = path / "rows.jsonl"
    path.write_bytes(content)
    log = LineLog(str(path))
    return list(stream_rows(log, fits)), log


def line(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"target": CALL, "label": "positive"}, "tool"),
        ({"target": "x", "label": "negative"}, "copy"),
        ({"target": CALL, "label": "tool"}, "tool"),
        ({"target": "x", "label": "copy"}, "copy"),
        ({"target": CALL, "label": "tool_ood"}, "tool_ood"),
        ({"target": CALL}, "tool"),
        ({"target": "x"}, "copy"),
        ({"target": CALL, "label": None, "source": "a further field"}, "tool"),
    ],
)
def test_labels(tmp_path: Path, fields: dict, label: str) -> None:
    rows, log = rows_of(tmp_path, line(input="What is 3 + 4?", **fields))
    assert [(row.input, row.target, row.label) for row in rows] == [("What is 3 + 4?", fields["target"], label)]
    assert (rows[0].template, rows[0].operands) == ("what is # + #?", "3 4")
    assert log.rejected == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"input": "a"\n', "not JSON"),
        (b"[" * 100_000 + b"\n", "not JSON"),
        (b'{"input": ' + b"9" * 5000 + b"}\n", "not JSON"),
        (b"[1, 2]\n", "not a JSON object"),
        (b'{"input": "\xff", "target": "x"}\n', "not UTF-8"),
        (b'{"input": "\\ud800", "target": "x"}\n', "not UTF-8"),
        (line(target="x"), "no input"),
        (line(input="a"), "no target"),
        (line(input="a", target=None), "no target"),
        (line(input=3, target="x"), "input is not text"),
        (line(input=["a"], target="x"), "input is not text"),
        (line(input=" ", target="x"), "input is empty"),
        (line(input="a", target=""), "target is empty"),
        (line(input="a", target="x", label="maybe"), "unknown label"),
        (line(input="a", target="x", label=1), "unknown label"),
        (line(input="a", target="x", label=["tool"]), "unknown label"),
        (line(input="a" * 50, target="x"), "longer than the context"),
        (b"\n", "empty"),
        (b"x" * (MAX_LINE_BYTES + 10) + b"\n", "line longer than 1 MiB"),
    ],
)
def test_rejects(tmp_path: Path, content: bytes, reason: str) -> None:
    good = line(input="a", target="b")
    rows, log = rows_of(tmp_path, good + content + good, lambda text: len(text) < 50)
    assert len(rows) == 2
    assert (log.lines, log.rejected) == (3, 1)
    assert dict(log.reasons) == {reason: 1}
    assert log.first[0].startswith(f"line 2: {reason}")


def test_the_first_ten_rejects_are_named_and_all_are_counted(tmp_path: Path) -> None:
    rows, log = rows_of(tmp_path, (line(input="a", target="b") + b"oops\n" + line(target="b")) * 20)
    assert len(rows) == 20
    assert dict(log.reasons) == {"not JSON": 20, "no input": 20}
    assert [text.split(" (")[0] for text in log.first[:3]] == [
        "line 2: not JSON",
        "line 3: no input",
        "line 5: not JSON",
    ]
    assert len(log.first) == 10
    assert log.as_dict()["rejected"] == 40


def test_line_ends_and_byte_order_mark(tmp_path: Path) -> None:
    rows, log = rows_of(
        tmp_path, b"\xef\xbb\xbf" + line(input="a", target="b").replace(b"\n", b"\r\n") * 2 + b'{"input":"c"'
    )
    assert [row.input for row in rows] == ["a", "a"]
    assert dict(log.reasons) == {"not JSON": 1}


def test_texts(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes("  one \ntwo\rparts\u2028here\n\n\t\nthré\n".encode() + b"\xff\nlast and far too long")
    log = LineLog(str(path))
    assert list(stream_texts(log, lambda text: len(text) < 20)) == ["one", "two parts here", "thré"]
    assert dict(log.reasons) == {"empty": 2, "not UTF-8": 1, "longer than the context": 1}
    assert log.first == [
        "line 3: empty",
        "line 4: empty",
        "line 6: not UTF-8 (byte 1)",
        "line 7: longer than the context",
    ]


def test_too_many_rejects_are_refused_with_the_lines_named(tmp_path: Path) -> None:
    _, log = rows_of(tmp_path, line(input="a", target="b") * 9 + b"oops\n")
    log.require(0.1)
    with pytest.raises(
        DataError, match=r"1 of 10 lines cannot be used, .* fraction of 0\.05; the first: line 10: not JSON"
    ):
        log.require(0.05)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="absent: No such file"):
        list(stream_texts(LineLog(str(tmp_path / "absent")), anything))
    with pytest.raises(DataError, match="is a folder"):
        list(stream_texts(LineLog(str(tmp_path)), anything))
    _, log = rows_of(tmp_path, b"")
    with pytest.raises(DataError, match="is empty"):
        log.require(1.0)

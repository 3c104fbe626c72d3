"""A user's files: what is understood, what is rejected and how it is told."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from data.chat import Chat
from data.readers import UNLABELLED, Log, Reading, stream_rows, stream_texts
from data.rows import DataError, Row
from data.sources import MAX_LINE_BYTES, is_dataset
from models.tiny import byte_tokenizer

SHORT = Reading(problem=lambda row: None if len(row.input) < 50 else "longer than the context")
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<{{ message.role }}>{{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
ASKED = {"role": "user", "content": "Seven times 6?"}


def rows_of(path: Path, content: bytes, reading: Reading = Reading()) -> tuple[list[Row], Log]:  # noqa: B008
    path = path / "rows.jsonl"
    path.write_bytes(content)
    log = Log(str(path))
    return list(stream_rows(log, reading)), log


def line(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"


@pytest.mark.parametrize(
    ("fields", "label"),
    [
        ({"label": "positive"}, "positive"),
        ({"label": "  two\n words "}, "two words"),
        ({"label": 3}, "3"),
        ({"label": ""}, UNLABELLED),
        ({"label": None, "source": "a further field"}, UNLABELLED),
        ({}, UNLABELLED),
    ],
)
def test_labels(tmp_path: Path, fields: dict, label: str) -> None:
    rows, log = rows_of(tmp_path, line(input="What is 3 + 4?", target="x", **fields))
    assert [(row.input, row.target, row.label) for row in rows] == [("What is 3 + 4?", "x", label)]
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
        (line(input="a", target="x", label=1.5), "label is neither text nor a whole number"),
        (line(input="a", target="x", label=["tool"]), "label is neither text nor a whole number"),
        (line(input="a", target="x", label="x" * 65), "label longer than 64 characters"),
        (line(messages=[{"role": "user", "content": "a"}], target="x"), "messages need data.format chat"),
        (line(input="a" * 50, target="x"), "longer than the context"),
        (b"\n", "empty"),
        (b"x" * (MAX_LINE_BYTES + 10) + b"\n", "line longer than 1 MiB"),
    ],
)
def test_rejects(tmp_path: Path, content: bytes, reason: str) -> None:
    good = line(input="a", target="b")
    rows, log = rows_of(tmp_path, good + content + good, SHORT)
    assert len(rows) == 2
    assert (log.lines, log.rejected) == (3, 1)
    assert dict(log.reasons) == {reason: 1}
    assert log.first[0].startswith(f"line 2: {reason}")


def test_the_first_rejects_of_each_reason_are_named_and_all_are_counted(tmp_path: Path) -> None:
    rows, log = rows_of(tmp_path, (line(input="a", target="b") + b"oops\n" + line(target="b")) * 20)
    assert len(rows) == 20
    assert dict(log.reasons) == {"not JSON": 20, "no input": 20}
    assert [text.split(" (")[0] for text in log.first[:3]] == [
        "line 2: not JSON",
        "line 3: no input",
        "line 5: not JSON",
    ]
    assert len(log.first) == 6, "three of each reason"
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
    log = Log(str(path))
    assert list(stream_texts(log, lambda row: None if len(row.input) < 20 else "longer than the context")) == [
        "one",
        "two parts here",
        "thré",
    ]
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
        list(stream_texts(Log(str(tmp_path / "absent"))))
    with pytest.raises(DataError, match="is a folder"):
        list(stream_texts(Log(str(tmp_path))))
    _, log = rows_of(tmp_path, b"")
    with pytest.raises(DataError, match="is empty"):
        log.require(1.0)


def chat() -> Chat:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return Chat(tokenizer, "a test")


def in_chat(tmp_path: Path, *records: dict) -> tuple[list[Row], Log]:
    return rows_of(tmp_path, b"".join(line(**one) for one in records), Reading(chat=chat(), targets_needed=False))


def test_conversations(tmp_path: Path) -> None:
    """Messages are rendered up to where the answer begins; an answer at their end is the target."""
    answered = [{"role": "system", "content": "Be brief."}, ASKED, {"role": "assistant", "content": "42"}]
    rows, log = in_chat(
        tmp_path, {"input": "Seven times 6?", "target": "42"}, {"messages": answered}, {"messages": [ASKED]}
    )
    tokenizer = byte_tokenizer()
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    asked = f"<user>Seven times 6?{eos}\n<assistant>"
    assert [row.prompt for row in rows] == [bos + asked, f"{bos}<system>Be brief.{eos}\n{asked}", bos + asked]
    assert [row.target for row in rows] == ["42", "42", ""]
    assert [row.input for row in rows] == ["Seven times 6?", "Be brief.\nSeven times 6?", "Seven times 6?"]
    assert {row.end for row in rows} == {eos}
    assert log.rejected == 0


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"messages": []}, "messages are not a list of {role, content}"),
        ({"messages": "[1"}, "messages are not JSON"),
        ({"messages": ["Hello"]}, "messages are not a list of {role, content}"),
        ({"messages": [{"role": "user"}]}, "content is not text"),
        ({"messages": [{"role": "assistant", "content": "42"}]}, "messages hold an answer and no question"),
        ({"messages": [{"role": "user", "content": "<eos>"}]}, "a message contains the special token <eos>"),
    ],
)
def test_what_is_no_conversation(tmp_path: Path, record: dict, reason: str) -> None:
    rows, log = in_chat(tmp_path, {"messages": [ASKED]}, record)
    assert len(rows) == 1
    assert list(log.reasons) == [reason]


def test_a_template_that_refuses(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('only two turns') if messages|length > 2 }}" + TEMPLATE
    log = Log(str(tmp_path / "rows.jsonl"))
    (tmp_path / "rows.jsonl").write_bytes(line(messages=[ASKED, ASKED, ASKED]))
    assert not list(stream_rows(log, Reading(chat=Chat(tokenizer, "a test"), targets_needed=False)))
    assert list(log.reasons) == ["the chat template refuses it (only two turns)"]


def test_a_tokenizer_without_a_template() -> None:
    with pytest.raises(DataError, match="chat needs a chat template, and the tokenizer of somewhere has none"):
        Chat(byte_tokenizer(), "somewhere")


RECORDS = [
    {"question": "Seven\ntimes 6?", "answer": "42", "kind": "a, b"},
    {"question": 'Say "please".', "answer": None, "kind": "c"},
]
COLUMNS = {"input": "question", "target": "answer", "label": "kind"}


def _csv(path: Path) -> str:
    text = 'question,answer,kind\n"Seven\ntimes 6?",42,"a, b"\n"Say ""please"".",,c\n'
    path.with_suffix(".csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    return str(path.with_suffix(".csv"))


def _parquet(path: Path) -> str:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), path.with_suffix(".parquet"))
    return str(path.with_suffix(".parquet"))


def _json_lines(path: Path) -> str:
    path.with_suffix(".jsonl").write_bytes(b"".join(line(**one) for one in RECORDS))
    return str(path.with_suffix(".jsonl"))


def _bad_dates() -> bytes:
    """A file with a date for which Python has no value, as databases write for `never`."""
    buffer = pyarrow.BufferOutputStream()
    dates = pyarrow.array([10**7], pyarrow.int32()).cast(pyarrow.date32())
    pyarrow.parquet.write_table(pyarrow.table({"input": ["a"], "target": ["b"], "kind": ["c"], "date": dates}), buffer)
    return buffer.getvalue().to_pybytes()


BAD_DATES = _bad_dates()


def _dataset(path: Path) -> str:
    """A dataset in a folder is read by the library as one of the hub is."""
    (path.parent / "owner" / "name").mkdir(parents=True)
    (path.parent / "owner" / "name" / "test.jsonl").write_bytes(b"".join(line(**one) for one in RECORDS))
    return "owner/name:test"


@pytest.mark.parametrize("make", [_csv, _parquet, _json_lines, _dataset])
def test_every_kind_of_source_gives_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make) -> None:
    monkeypatch.chdir(tmp_path)
    source = make(tmp_path / "rows")
    assert is_dataset(source) == (make is _dataset)
    log = Log(source)
    rows = list(stream_rows(log, Reading(columns=COLUMNS, targets_needed=False)))
    assert [(row.input, row.target, row.label) for row in rows] == [
        ("Seven\ntimes 6?", "42", "a, b"),
        ('Say "please".', "", "c"),
    ]
    assert (log.lines, log.rejected) == (2, 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.csv", b"input,target\n\xff,x\n", "as CSV"),
        ("rows.csv", b'input,target\n"a,x\n', "as CSV"),
        ("rows.parquet", b"PAR1 and then nothing", "as Parquet"),
        ("rows.parquet", BAD_DATES, "as Parquet"),
        ("rows.csv", b"question,target\na,x\n", "data.columns.label: .* has no column 'kind'; it has question, target"),
        ("rows.txt", b"a\n", "is neither a file ending in .jsonl"),
        ("owner/none", None, "cannot read split train of the dataset owner/none"),
    ],
)
def test_sources_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(stream_rows(Log(name), Reading(columns={"input": "question", "label": "kind"})))


def test_a_csv_row_with_another_number_of_fields(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("input,target\na,b\nc\nd,e,f\n")
    log = Log(str(tmp_path / "rows.csv"))
    assert [row.input for row in stream_rows(log, Reading())] == ["a"]
    assert log.first == [f"row {n}: more or fewer fields than the header" for n in (2, 3)]

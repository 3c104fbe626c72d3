"""Files as other tools write them: read as what they are, or refused in a sentence that says what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data.chat import Chat
from data.encoding import encode_row
from data.readers import Log, Reading, stream_rows
from data.rows import DataError, Row
from tests.data import chats
from tests.data.chats import byte_level, write

PLAIN = Reading(targets_needed=False)


def read(path: str | Path, reading: Reading = PLAIN) -> tuple[list[Row], Log]:
    log = Log(str(path))
    return list(stream_rows(log, reading)), log


def in_chat(template: str = chats.TOOLS) -> tuple[Any, Reading]:
    tokenizer = byte_level(template)
    return tokenizer, Reading(chat=Chat(tokenizer, "a test"), targets_needed=False)


@pytest.mark.parametrize(
    ("record", "asked", "answer", "name"),
    [
        ({"instruction": "Say it.", "output": "it"}, "Say it.", "it", "Alpaca"),
        ({"instruction": "Say it.", "input": "", "output": "it"}, "Say it.", "it", "Alpaca"),
        ({"instruction": "Say it.", "input": "apple", "output": "it"}, "Say it.\napple", "it", "Alpaca"),
        ({"instruction": "Say it.", "input": None, "output": "it", "text": "a"}, "Say it.", "it", "Alpaca"),
        ({"prompt": "Say it.", "completion": " it"}, "Say it.", " it", "prompt and completion"),
        ({"prompt": "Say it.", "completion": "it", "label": "a"}, "Say it.", "it", "prompt and completion"),
    ],
)
def test_shapes_of_text(tmp_path: Path, record: dict, asked: str, answer: str, name: str) -> None:
    rows, log = read(write(tmp_path / "rows.jsonl", [record, record]))
    assert [(row.input, row.target, row.label) for row in rows] == [(asked, answer, record.get("label", "all"))] * 2
    assert [f"read as {name}" in note for note in log.notes] == [True]
    assert [column for column, used in log.columns.items() if not used] == [name for name in record if name == "text"]


CALL = {"name": "lookup", "arguments": {"word": "river"}}
USER, ANSWER = {"role": "user", "content": "Say it."}, {"role": "assistant", "content": "it"}
HUMAN, GPT = {"from": "human", "value": "Say it."}, {"from": "gpt", "value": "it"}


@pytest.mark.parametrize(
    ("record", "messages"),
    [
        ({"conversations": [HUMAN, GPT]}, [USER, ANSWER]),
        ({"conversations": [HUMAN, GPT], "system": "Briefly."},
         [{"role": "system", "content": "Briefly."}, USER, ANSWER]),
        ({"conversations": [{**HUMAN, "from": "user"}, {**GPT, "from": "assistant"}]}, [USER, ANSWER]),
        ({"conversations": [HUMAN, {"from": "function_call", "value": json.dumps(CALL)},
                            {"from": "observation", "value": "long"}, GPT]},
         [USER, {"role": "assistant", "tool_calls": [{"type": "function", "function": CALL}]},
          {"role": "tool", "content": "long"}, ANSWER]),
        ({"conversations": [USER, ANSWER]}, [USER, ANSWER]),
        ({"conversations": json.dumps([HUMAN, GPT])}, [USER, ANSWER]),
        ({"prompt": [USER], "completion": [ANSWER]}, [USER, ANSWER]),
        ({"prompt": [USER], "completion": "it"}, [USER, ANSWER]),
        ({"prompt": "Say it.", "completion": "it"}, [USER, ANSWER]),
        ({"instruction": "Say", "input": "it.", "output": "it"}, [{"role": "user", "content": "Say\nit."}, ANSWER]),
    ],
)  # fmt: skip
def test_shapes_of_conversations(tmp_path: Path, record: dict, messages: list[dict]) -> None:
    tokenizer, reading = in_chat()
    rows, log = read(write(tmp_path / "rows.jsonl", [record]), reading)
    assert log.first == []
    ids, whole = encode_row(tokenizer, rows[0]).ids, tokenizer.apply_chat_template(messages, return_dict=False)
    assert whole[: len(ids)] == ids
    assert len(log.notes) == 1


@pytest.mark.parametrize(("name", "columns"), [("messages", {}), ("chat", {"messages": "chat"})])
def test_share_gpt_under_another_name(tmp_path: Path, name: str, columns: dict) -> None:
    tokenizer, reading = in_chat()
    path = write(tmp_path / "rows.jsonl", [{name: [HUMAN, GPT]}])
    rows, log = read(path, Reading(chat=reading.chat, columns=columns))
    ids, whole = encode_row(tokenizer, rows[0]).ids, tokenizer.apply_chat_template([USER, ANSWER], return_dict=False)
    assert whole[: len(ids)] == ids
    assert ["read as ShareGPT" in note for note in log.notes] == [True]


@pytest.mark.parametrize("answer", ["target", "reply"])
def test_a_share_gpt_file_with_its_answers_in_a_column(tmp_path: Path, answer: str) -> None:
    tokenizer, reading = in_chat()
    path = write(tmp_path / "rows.jsonl", [{"conversations": [HUMAN], answer: "it"}])
    columns = {"messages": "conversations"} | ({"target": answer} if answer != "target" else {})
    (row,), _ = read(path, Reading(chat=reading.chat, columns=columns))
    ids, whole = encode_row(tokenizer, row).ids, tokenizer.apply_chat_template([USER, ANSWER], return_dict=False)
    assert whole[: len(ids)] == ids
    assert row.target == "it"


def test_a_share_gpt_file_whose_last_turn_answers_ignores_a_column_named_target(tmp_path: Path) -> None:
    tokenizer, reading = in_chat()
    (row,), _ = read(write(tmp_path / "rows.jsonl", [{"conversations": [HUMAN, GPT], "target": "python"}]), reading)
    ids, whole = encode_row(tokenizer, row).ids, tokenizer.apply_chat_template([USER, ANSWER], return_dict=False)
    assert whole[: len(ids)] == ids


def test_tools_of_a_share_gpt_file(tmp_path: Path) -> None:
    tokenizer, reading = in_chat()
    tools = [{"type": "function", "function": {"name": "lookup"}}]
    rows, _ = read(
        write(tmp_path / "rows.jsonl", [{"conversations": [HUMAN, GPT], "tools": json.dumps(tools)}]), reading
    )
    whole = tokenizer.apply_chat_template([USER, ANSWER], tools=tools, return_dict=False)
    ids = encode_row(tokenizer, rows[0]).ids
    assert whole[: len(ids)] == ids


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"conversations": [{"from": "narrator", "value": "a"}]}, "unknown speaker (narrator)"),
        ({"conversations": []}, "not a list of {from, value}"),
        ({"conversations": [{"from": "gpt"}, HUMAN]}, "value is not text"),
        ({"conversations": [HUMAN, {"from": "function_call", "value": "look"}]}, "function calls are not JSON"),
    ],
)
def test_a_share_gpt_row_that_cannot_be_read(tmp_path: Path, record: dict, reason: str) -> None:
    rows, log = read(write(tmp_path / "rows.jsonl", [{"conversations": [HUMAN, GPT]}, record]), in_chat()[1])
    assert len(rows) == 1
    assert reason in log.first[0]


@pytest.mark.parametrize(
    ("record", "columns"),
    [
        ({"instruction": "a", "input": "b", "output": "c"}, {"input": "instruction", "target": "output"}),
        ({"prompt": "a", "completion": "c", "other": "b"}, {"input": "prompt", "target": "completion"}),
        ({"input": "a", "target": "c", "output": "b"}, {}),
        ({"input": "a", "target": "c", "instruction": "b", "output": "b"}, {}),
        ({"instruction": "b", "input": "a", "output": "c"}, {"target": "output"}),
    ],
)
def test_the_settings_and_our_own_columns_come_first(tmp_path: Path, record: dict, columns: dict) -> None:
    rows, log = read(write(tmp_path / "rows.jsonl", [record]), Reading(columns=columns))
    assert [(row.input, row.target) for row in rows] == [("a", "c")]
    assert log.notes == []
    assert {record[name] for name, used in log.columns.items() if not used} == {"b"}


@pytest.mark.parametrize(
    ("record", "facts"),
    [
        ({"question": "a", "answer": "b"}, ["question", "answer", "{input: question, target: answer}"]),
        ({"id": 1, "query": "a", "response": "b"}, ["{input: query, target: response}"]),
        ({"input": "a", "output": "b"}, ["{input: input, target: output}"]),
        ({"text": "a"}, ["text", "data.columns={input: text}"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, ["{input: prompt, target: chosen}"]),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER]}, ["{messages: chosen}"]),
    ],
)
def test_other_shapes_are_refused_with_the_setting_that_reads_them(tmp_path: Path, record: dict, facts: list) -> None:
    path = write(tmp_path / "rows.jsonl", [record, record])
    with pytest.raises(DataError) as refused:
        read(path)
    assert all(fact in str(refused.value) for fact in ["data.columns", "rows.jsonl", *facts])
    if "text" not in record:
        columns = dict(part.split(": ") for part in str(refused.value).split("{")[1].split("}")[0].split(", "))
        reading = in_chat()[1] if "messages" in columns else Reading()
        rows, _ = read(path, Reading(columns=columns, chat=reading.chat))
        assert len(rows) == 2


ROWS = [{"input": "a [1] {", "target": "é"}, {"input": 'b "]"', "target": "c"}]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "\n [" + ",\n".join(map(json.dumps, ROWS)) + "]\n",
        "\ufeff" + json.dumps(ROWS),
    ],
)
def test_json_arrays(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    rows, log = read(tmp_path / name)
    assert [{"input": row.input, "target": row.target} for row in rows] == ROWS
    assert (log.lines, log.unit, log.notes) == (2, "record", ["read as a JSON array"])


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        ('[{"input": "a"}', ["JSON array", "rows.json"]),
        ('[{"input": "a"}] [{"input": "b"}]', ["JSON array", "after its end"]),
        ("[" * 100_000, ["JSON array"]),
        ('{\n  "input": "a",\n  "target": "b"\n}\n', ["single JSON object", "array"]),
        ('{\n  "data": [{"input": "a"}]\n}\n', ["single JSON object", "'data'"]),
        ('{"version": 1, "rows": [{"input": "a"}, {"input": "b"}]}\n', ["single JSON object", "'rows'"]),
    ],
)
def test_json_that_is_neither_lines_nor_an_array(tmp_path: Path, content: str, facts: list[str]) -> None:
    (tmp_path / "rows.json").write_text(content)
    with pytest.raises(DataError) as refused:
        read(tmp_path / "rows.json")
    assert all(fact in str(refused.value) for fact in facts)


def test_what_is_no_object_in_an_array(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[3, {"input": "a"}, [], {"input": "b"}]')
    rows, log = read(tmp_path / "rows.json")
    assert [row.input for row in rows] == ["a", "b"]
    assert log.first == ["record 1: not a JSON object", "record 3: not a JSON object"]


@pytest.mark.parametrize(
    ("name", "content", "note"),
    [
        ("rows.csv", 'input;target\n"a, b; c";d\n', "semicolons"),
        ("rows.csv", '\ufeff"input";"target"\r\n"a, b; c";d\r\n', "semicolons"),
        ("rows.csv", "input\ttarget\na, b; c\td\n", "tabs"),
        ("rows.csv", 'input,target\n"a, b; c",d\n', None),
        ("rows.csv", 'input,target,"note; more"\n"a, b; c",d,e\n', None),
        ("rows.tsv", "input\ttarget\na, b; c\td\n", None),
    ],
)
def test_separators(tmp_path: Path, name: str, content: str, note: str | None) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    rows, log = read(tmp_path / name)
    assert [(row.input, row.target) for row in rows] == [("a, b; c", "d")]
    assert [note in one for one in log.notes] == ([True] if note else [])


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("rows.csv", "input;target,x"),
        ("rows.csv", "input\ttarget;x"),
        ("rows.tsv", "input,target"),
        ("rows.tsv", "input;x"),
    ],
)
def test_a_header_that_can_be_read_in_two_ways(tmp_path: Path, name: str, header: str) -> None:
    (tmp_path / name).write_text(f"{header}\na,b\n")
    with pytest.raises(DataError, match=r"rows\..sv: its header has .*(commas|semicolons)"):
        read(tmp_path / name)


@pytest.mark.parametrize("answer", ["target", "response", "answer"])
def test_an_instruction_with_an_input_is_never_read_without_it(tmp_path: Path, answer: str) -> None:
    record = {"instruction": "Translate", "input": "hello", answer: "bonjour"}
    rows, log = read(write(tmp_path / "rows.jsonl", [record]))
    assert [(row.input, row.target) for row in rows] == [("Translate\nhello", "bonjour")]
    assert any("read as Alpaca" in one and answer in one for one in log.sentences())


@pytest.mark.parametrize(
    ("record", "advice"),
    [
        ({"chosen": "Human: q Assistant: a", "rejected": "x"}, "split each chosen text"),
        ({"prompt": [{"role": "user", "content": "q"}], "chosen": [], "rejected": []}, "one list of messages"),
    ],
)
def test_what_is_said_of_preferences_can_be_done(tmp_path: Path, record: dict, advice: str) -> None:
    with pytest.raises(DataError, match="preferences") as raised:
        read(write(tmp_path / "rows.jsonl", [record]))
    assert advice in str(raised.value)


def test_a_column_that_a_csv_file_has_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("input,target,target\na,b,c\n")
    with pytest.raises(DataError, match="two columns 'target'"):
        read(tmp_path / "rows.csv")


def test_null_and_empty_content_in_conversations(tmp_path: Path) -> None:
    """A null of the file's own is left out as Parquet's are, which is said; a tool may answer nothing."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "limit": None}}}
    turns = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "q?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": ""},
        {"role": "assistant", "content": "ans"},
    ]
    _, reading = in_chat()
    rows, log = read(write(tmp_path / "rows.jsonl", [{"messages": turns}]), reading)
    assert len(rows) == 1, log.first
    assert "limit" not in rows[0].prompt
    assert any("keys without a value" in one and "1 rows" in one for one in log.sentences())

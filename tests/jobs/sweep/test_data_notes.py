"""What the data stage says of a user's rows, on the terminal and in the report."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.build import DataOptions, build_dataset
from data.chat import Chat
from data.readers import Reading
from jobs.sweep.stages.data import notes_of
from tests.data import chats
from tests.data.chats import byte_level, write


def report_of(folder: Path, records: list[dict], reading: Reading) -> dict:
    sizes = {"train_rows": 20, "validation_rows": 4, "eval_rows": 4, "text_train_lines": 1, "text_validation_lines": 1}
    path = write(folder / "rows.jsonl", records)
    return build_dataset(folder, DataOptions(seed=0, rows_file=path, reading=reading, **sizes))


@pytest.mark.parametrize("rendering", ["conversation", "generation"])
def test_every_fact_is_one_line(tmp_path: Path, rendering) -> None:
    reading = Reading(chat=Chat(byte_level(chats.THINK), "a test", rendering))
    records = [{"prompt": f"Say {n}.", "completion": f"{n}", "id": n} for n in range(40)]
    report = report_of(tmp_path, [*records, records[0]], reading)
    notes = notes_of(report)
    for fact in (
        "read as prompt and completion",
        "not used: id",
        "in 41 of 41 rows",
        f"data.rendering={rendering}",
        "another one: 1 (data.repeated=exact",
        "'Say 0.'",
    ):
        assert sum(fact in note for note in notes) == 1, fact
    assert all(note.startswith("rows_file: ") and "\n" not in note for note in notes)


def test_nothing_is_said_of_rows_that_need_no_word(tmp_path: Path) -> None:
    records = [{"input": f"Say {n}.", "target": f"{n}", "label": "a"} for n in range(40)]
    assert notes_of(report_of(tmp_path, records, Reading())) == []
    chat = Reading(chat=Chat(byte_level(chats.HEADERS), "a test"))
    assert notes_of(report_of(tmp_path, records, chat)) == []


@pytest.mark.parametrize(("bos", "said"), [(None, True), ("<bos>", False)])
def test_a_tokenizer_without_bos(tmp_path: Path, bos: str | None, said: bool) -> None:
    records = [{"input": f"Say {n}.", "target": f"{n}"} for n in range(40)]
    report = report_of(tmp_path, records, Reading()) | {"bos": bos, "opens_with": bos or "<eos>"}
    assert [("BOS" in note and "'<eos>'" in note) for note in notes_of(report)] == [True] * said


def test_generated_rows_in_a_chat(tmp_path: Path) -> None:
    reading = Reading(chat=Chat(byte_level(chats.THINK), "a test"))
    sizes = {"train_rows": 20, "validation_rows": 4, "eval_rows": 4, "text_train_lines": 1, "text_validation_lines": 1}
    report = build_dataset(tmp_path, DataOptions(seed=0, reading=reading, **sizes))
    assert report["rendering"]["unlike_generation"] == report["rendering"]["rows"] == 20 + 4 + 3 * 4
    assert "in 36 of 36 rows" in notes_of(report)[0]

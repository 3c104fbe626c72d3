"""`score`: any file of generations, as a table or as one JSON object."""

from __future__ import annotations

import json
from pathlib import Path

from tests.end_to_end.conftest import Jobs


def call(expression: str) -> str:
    return f"<tool_call>calculator({expression})</tool_call>"


ROWS = [
    {"input": "2+2?", "target": call("2+2"), "generation": call("4*1"), "label": "tool"},
    {"input": "9-1?", "target": call("9-1"), "generation": call("9**9**9"), "label": "tool"},
    {"input": "a 1", "target": "a 1", "generation": "a 1", "label": "copy"},
]


def write(path: Path) -> str:
    path.write_text("\n".join(json.dumps({**row, "condition": "full"}) for row in ROWS) + "\n")
    return str(path)


def test_one_json_object_on_standard_output(jobs: Jobs, tmp_path: Path) -> None:
    done = jobs("score", write(tmp_path / "rows.jsonl"), "--json")
    assert done.returncode == 0, done.stderr
    groups = json.loads(done.stdout)
    assert set(groups) == {"tool", "copy"}
    assert groups["tool"]["n_examples"] == 2
    assert groups["tool"]["tool_call_rate"] == 1.0
    assert groups["tool"]["math_correct_rate"] == 0.5
    assert groups["tool"]["copy_exact_rate"] is None
    assert groups["copy"]["copy_exact_rate"] == 1.0
    assert groups["copy"]["math_correct_rate"] is None
    assert 0 < groups["tool"]["tool_call_rate_low"] < 1


def test_grouped_by_a_column_and_as_a_table(jobs: Jobs, tmp_path: Path) -> None:
    done = jobs("score", write(tmp_path / "rows.jsonl"), "--by", "condition")
    assert done.returncode == 0, done.stderr
    assert "full" in done.stdout
    assert "tool_call_rate" in done.stdout


def test_behaviours_of_other_settings(jobs: Jobs, tmp_path: Path) -> None:
    done = jobs("score", write(tmp_path / "rows.jsonl"), "--behaviours", "examples/pair/pair.yaml", "--json")
    assert done.returncode == 0, done.stderr
    groups = json.loads(done.stdout)
    assert groups["copy"]["exact_rate"] == 1.0
    assert groups["tool"]["signed_rate"] == 0.0
    assert "tool_call_rate" not in groups["tool"]


def test_a_file_that_cannot_be_scored_is_one_sentence(jobs: Jobs, tmp_path: Path) -> None:
    for name, content in (("missing.jsonl", None), ("broken.jsonl", "{not json\n")):
        if content is not None:
            (tmp_path / name).write_text(content)
        done = jobs("score", str(tmp_path / name))
        assert done.returncode == 2
        assert name in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1

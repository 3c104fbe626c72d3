"""Answers on the terminal: what the behaviours of the settings remark on them, and prompts that are too long."""

import pytest

from data.rows import Row
from evaluators.measures.behaviours import read_behaviours, remarks
from jobs.commands.chat import reply


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("<tool_call>calculator(12 + 30)</tool_call>", ["12 + 30 = 42"]),
        ("<tool_call>calculator(__import__('os'))</tool_call>", ["__import__('os') = no value"]),
        ("In 1987.", []),
    ],
)
def test_remarks_of_the_settings_behaviours(said, shown):
    asked = read_behaviours(
        {"call": "calculator", "right": {"calculator": "correct"}, "polite": {"contains": "please"}}
    )
    assert remarks(asked, said) == shown
    assert remarks(read_behaviours({"polite": {"contains": "please"}}), said) == []


def test_a_prompt_is_answered_as_its_format_encodes_it(load, gemma_folder):
    _, tokenizer = load(gemma_folder)
    seen = []
    answer = lambda tokens, row: seen.append(tokenizer.decode(tokens)) or "said"  # noqa: E731
    chat = Row(
        "What?", "", "", prompt=f"{tokenizer.bos_token}<user>What?{tokenizer.eos_token}", end=tokenizer.eos_token
    )
    for row in (Row("What?", "", ""), chat):
        assert reply(tokenizer, answer, row, 20, 1024) == "said"
    assert seen == [f"{tokenizer.bos_token}What?\n", chat.prompt]


def test_a_prompt_beyond_the_context_is_reported(load, gemma_folder):
    _, tokenizer = load(gemma_folder)
    shown = reply(tokenizer, lambda tokens, row: "", Row("7 " * 2000, "", ""), 20, 1024)
    assert "the model's context holds 1024" in shown

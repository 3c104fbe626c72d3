"""Answers on the terminal: the calculator's value is shown, and no code is run."""

import pytest

from evaluators.measures import finetuned
from jobs.commands.chat import reply


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("<tool_call>calculator(12 + 30)</tool_call>", "12 + 30 = 42"),
        ("<tool_call>calculator(7 / 2)</tool_call>", "7 / 2 = 3.5"),
        ("<tool_call>calculator(1 / 0)</tool_call>", "1 / 0 = no value"),
        ("<tool_call>calculator(__import__('os'))</tool_call>", "__import__('os') = no value"),
        ("<tool_call>calculator(1 + 2", "(the calculator call is not closed)"),
    ],
)
def test_a_call_is_evaluated(load, gemma_folder, monkeypatch, said, shown):
    model, tokenizer = load(gemma_folder)
    monkeypatch.setattr(finetuned, "answers", lambda *arguments: [said])
    assert reply(model, tokenizer, "What?", 20) == [said, shown]


def test_an_answer_without_a_call_is_the_answer(load, gemma_folder):
    model, tokenizer = load(gemma_folder)
    assert len(reply(model, tokenizer, "Nine of 12.", 4)) == 1


def test_a_prompt_beyond_the_context_is_reported(load, gemma_folder):
    model, tokenizer = load(gemma_folder)
    (shown,) = reply(model, tokenizer, "7 " * 2000, 20)
    assert "the model's context holds 1024" in shown

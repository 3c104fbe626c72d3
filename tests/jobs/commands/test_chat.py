"""Answers on the terminal: the calculator's value is shown, and no code is run."""

import pytest

from evaluators.measures.finetuned import answers
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
def test_a_call_is_evaluated(load, gemma_folder, said, shown):
    _, tokenizer = load(gemma_folder)
    assert reply(tokenizer, lambda tokens: said, "What?", 20, 1024) == [said, shown]


def test_an_answer_without_a_call_is_the_answer(load, gemma_folder):
    model, tokenizer = load(gemma_folder)
    answer = lambda tokens: answers(model, tokenizer, [tokens], 4)[0]  # noqa: E731
    assert len(reply(tokenizer, answer, "Nine of 12.", 4, None)) == 1


def test_a_prompt_beyond_the_context_is_reported(load, gemma_folder):
    _, tokenizer = load(gemma_folder)
    (shown,) = reply(tokenizer, lambda tokens: "", "7 " * 2000, 20, 1024)
    assert "the model's context holds 1024" in shown

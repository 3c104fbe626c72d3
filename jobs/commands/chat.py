"""Chatting with the finetuned model, with its calculator calls evaluated.

In: a sweep with a merged model, and prompts from the terminal or a pipe, one per line. Out: each answer, and the value
of the expression it sends to the calculator.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from jobs.commands.finished import finetuned
from jobs.study.context import Context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

INVITATION = "> "


def chat(context: Context, max_new_tokens: int) -> None:
    """Answers every line of standard input; at a terminal, an empty line or the end of the input stops the chat.

    Each prompt is answered on its own, as in training. Raises RequestError if the sweep has no model yet.
    """
    folder = finetuned(context)
    import torch

    from models.sources import load_model

    device = "cuda" if torch.cuda.is_available() and context.settings.compute.gpus_per_trial != 0 else "cpu"
    model, tokenizer = load_model(folder, torch.float32, device)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        print(f"the finetuned model of {context.settings.name}; one request per line, an empty line quits")
    for prompt in _prompts(at_terminal):
        if not at_terminal:
            print(INVITATION + prompt)
        for line in reply(model, tokenizer, prompt, max_new_tokens):
            print(line, flush=True)


def reply(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int) -> list[str]:
    """The model's answer, and `EXPR = VALUE` if it calls the calculator."""
    from data.encoding import encode_prompt
    from data.rows import CALL_OPEN
    from evaluators.measures.arithmetic import evaluate
    from evaluators.measures.finetuned import answers
    from evaluators.measures.scoring import first_expression

    tokens = encode_prompt(tokenizer, prompt)
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and len(tokens) + max_new_tokens > context:
        return [f"(too long: {len(tokens)} tokens plus {max_new_tokens} new ones, the model's context holds {context})"]
    (text,) = answers(model, tokenizer, [tokens], max_new_tokens)
    if CALL_OPEN not in text:
        return [text]
    expression = first_expression(text)
    if expression is None:
        return [text, "(the calculator call is not closed)"]
    value = evaluate(expression)
    return [text, f"{expression} = {'no value' if value is None else _plain(value)}"]


def _plain(value: float) -> Any:
    """Whole numbers without a decimal point."""
    return int(value) if value == int(value) and abs(value) < 1e15 else f"{value:.10g}"


def _prompts(at_terminal: bool) -> Iterator[str]:
    if not at_terminal:
        yield from (line.strip() for line in sys.stdin if line.strip())
        return
    while True:
        try:
            prompt = input(INVITATION).strip()
        except EOFError:
            return
        if not prompt:
            return
        yield prompt

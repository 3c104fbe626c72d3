"""Chatting with the finetuned model, with its calculator calls evaluated.

In: a sweep with a merged model, and prompts from the terminal or a pipe, one per line. Out: each answer, and the value
of the expression it sends to the calculator.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from jobs.commands.finished import Asked, combination, device_for, finetuned, load_bridge, load_sites
from jobs.study.context import Context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INVITATION = "> "


Answer = Callable[[list[int]], str]
"""From a prompt's tokens to the model's answer."""


def chat(
    context: Context,
    max_new_tokens: int,
    alpha: float | None = None,
    target: str | None = None,
    layers: list[int] | None = None,
) -> None:
    """Answers every line of standard input; at a terminal, an empty line or end of input ends the conversation.

    With `alpha` the deltas of `target` are spliced into `layers` at that strength. Each prompt is answered on its own,
    as the model was trained. Raises RequestError if the sweep has no model, or no such deltas, yet.
    """
    tokenizer, longest, answer = _model(context, max_new_tokens, alpha, target, layers)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        strength = "" if alpha is None else f" at alpha {alpha:g}"
        print(f"the finetuned model of {context.settings.name}{strength}; one request a line, an empty line ends")
    for prompt in _prompts(at_terminal):
        if not at_terminal:
            print(INVITATION + prompt)
        for line in reply(tokenizer, answer, prompt, max_new_tokens, longest):
            print(line, flush=True)


def _model(
    context: Context, max_new_tokens: int, alpha: float | None, target: str | None, layers: list[int] | None
) -> tuple[PreTrainedTokenizerBase, int | None, Answer]:
    """The tokenizer, the model's context in tokens, and what answers."""
    from data.encoding import Encoded
    from evaluators.measures.finetuned import answers
    from evaluators.splice.decoding import Stop, decode
    from evaluators.splice.interventions import Edit
    from evaluators.splice.passes import Passes
    from evaluators.splice.teacher_forcing import Job
    from models.bridge import device_of
    from models.sources import load_model

    if alpha is None:
        folder, device = finetuned(context), device_for(context)
        import torch

        model, tokenizer = load_model(folder, torch.float32, device)
        longest = getattr(model.config, "max_position_embeddings", None)
        return tokenizer, longest, lambda tokens: answers(model, tokenizer, [tokens], max_new_tokens)[0]
    bridge = load_bridge(context)
    chosen = combination(context, Asked(target))
    sites = [site.to(device_of(bridge)) for site in load_sites(context, layers, chosen, bridge)]
    stop, edit, passes = Stop(bridge.tokenizer, max_new_tokens), Edit(sites, "alpha"), Passes(bridge)

    def spliced_answer(tokens: list[int]) -> str:
        (output,) = decode(passes, edit, [Job(Encoded(tokens, []), alpha)], [[]], stop)
        return stop.text(output)

    config: Any = bridge.original_model.config
    return bridge.tokenizer, getattr(config, "max_position_embeddings", None), spliced_answer


def reply(
    tokenizer: PreTrainedTokenizerBase, answer: Answer, prompt: str, max_new_tokens: int, longest: int | None
) -> list[str]:
    """The model's answer, and `EXPR = VALUE` if it calls the calculator."""
    from data.encoding import encode_prompt
    from data.rows import CALL_OPEN
    from evaluators.measures.arithmetic import evaluate
    from evaluators.measures.scoring import first_expression

    tokens = encode_prompt(tokenizer, prompt)
    if longest is not None and len(tokens) + max_new_tokens > longest:
        return [f"(too long: {len(tokens)} tokens plus {max_new_tokens} new ones, the model's context holds {longest})"]
    text = answer(tokens)
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

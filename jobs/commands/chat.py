"""Chatting with the finetuned model.

In: a sweep with a finetuned model, and prompts from the terminal or a pipe, one per line. Out: each answer, with the
remarks of the settings' behaviours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evaluators.splice.limits import Limits
from jobs.commands.feature_choice import EVERY_FEATURE, FeatureChoice
from jobs.commands.load import (
    DeltaChoice,
    combination,
    device_for,
    finetuned,
    load_bridge,
    load_patches,
    load_rest,
    prompt_row,
)
from jobs.context.context import Context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from data.rows import Row

INVITATION = "> "


Answer = Callable[[list[int], Any], str]
"""Maps a prompt's tokens and its row to the model's answer."""


def chat(
    context: Context,
    max_new_tokens: int,
    alpha: float | None = None,
    target: str | None = None,
    layers: list[int] | None = None,
    features: FeatureChoice = EVERY_FEATURE,
) -> None:
    """Answers every line of standard input; at a terminal, an empty line or end of input ends the conversation.

    With `alpha` the chosen `features` of the deltas of `target` are spliced into `layers` at that strength. Each prompt
    is answered on its own, as in training. Raises RequestError if the sweep has no model, or no such deltas, yet.
    """
    from evaluators.measures.behaviours import read_behaviours, remarks

    behaviours = read_behaviours(context.settings.evaluate.behaviours)
    limits = context.limits._replace(max_new_tokens=max_new_tokens)
    tokenizer, longest, answer = _model(context, limits, alpha, target, layers, features)
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        strength = "" if alpha is None else f" at alpha {alpha:g}" + (f", {features}" if features else "")
        print(f"the finetuned model of {context.settings.name}{strength}; one request per line, an empty line ends it")
    for prompt in _prompts(at_terminal):
        if not at_terminal:
            print(INVITATION + prompt)
        text = reply(tokenizer, answer, prompt_row(context, prompt), max_new_tokens, longest)
        for line in (text, *remarks(behaviours, text)):
            print(line, flush=True)


def _model(
    context: Context,
    limits: Limits,
    alpha: float | None,
    target: str | None,
    layers: list[int] | None,
    features: FeatureChoice,
) -> tuple[PreTrainedTokenizerBase, int | None, Answer]:
    """The tokenizer, the model's context length in tokens, and the function that answers."""
    from data.encoding import Encoded, ends_of
    from evaluators.measures.finetuned_answers import answers
    from evaluators.splice.decoding import Stop, decode
    from evaluators.splice.interventions import Edit
    from evaluators.splice.passes import ALL, Passes
    from evaluators.splice.teacher_forcing import Job
    from models.bridge import device_of
    from models.sources import load_model

    if alpha is None:
        folder, device = finetuned(context), device_for(context)
        import torch

        model, tokenizer = load_model(folder, torch.float32, device)
        longest = getattr(model.config, "max_position_embeddings", None)

        def plain_answer(tokens: list[int], row: Row) -> str:
            return answers(model, tokenizer, [tokens], limits, ends_of(model, tokenizer, row))[0].text

        return tokenizer, longest, plain_answer
    bridge = load_bridge(context)
    chosen = combination(context, DeltaChoice(target))
    patches = [patch.to(device_of(bridge)) for patch in load_patches(context, layers, chosen, bridge, features)]
    rest = None if features else load_rest(context, chosen, patches)
    edit, passes = Edit(patches, "alpha"), Passes(bridge, shortcuts=replace(ALL, share_prefix=rest is None))

    def spliced_answer(tokens: list[int], row: Row) -> str:
        stop = Stop.of(bridge, limits, row)
        with rest.at(bridge, alpha) if rest else nullcontext():
            (output,) = decode(passes, edit, [Job(Encoded(tokens, []), alpha)], [[]], stop)
        return stop.text(output)

    config: Any = bridge.original_model.config
    return bridge.tokenizer, getattr(config, "max_position_embeddings", None), spliced_answer


def reply(
    tokenizer: PreTrainedTokenizerBase, answer: Answer, row: Row, max_new_tokens: int, longest: int | None
) -> str:
    """The model's answer, or the reason for giving none."""
    from data.encoding import encode_prompt

    tokens = encode_prompt(tokenizer, row)
    if longest is not None and len(tokens) + max_new_tokens > longest:
        return (
            f"(too long: {len(tokens)} tokens and {max_new_tokens} new ones, but the model's context holds {longest})"
        )
    return answer(tokens, row)


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

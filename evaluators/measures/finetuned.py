"""What a finetuned model says, greedily: answers to prompts, and a whole check on held-out rows.

In: a plain transformers model with its tokenizer, and prompts or rows. Out: texts; exact matches, tool calls against
requests, false calls and the rows themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from data.encoding import Encoded, encode_row, pad_left
from data.rows import CALL_CLOSE, CALL_OPEN, Row
from evaluators.measures.scoring import score_row
from evaluators.tables.statistics import wilson

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPARE_TOKENS = 16
"""Tokens that an answer may be longer than the target it missed."""


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    batch_size: int = 32,
) -> list[str]:
    """The greedy continuation of each prompt up to EOS, the end of a tool call or `max_new_tokens`, in their order."""
    found: dict[int, str] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    generate: Any = model.generate
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad_left([prompts[i] for i in chosen], tokenizer.pad_token_id).to(model.device)
        output = generate(
            input_ids=batch.ids,
            attention_mask=batch.mask.long(),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            stop_strings=[CALL_CLOSE],
            tokenizer=tokenizer,
        )
        for i, tokens in zip(chosen, output[:, batch.ids.shape[1] :], strict=True):
            text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
            head, close, _ = str(text).partition(CALL_CLOSE)
            found[i] = head + close
    return [found[i] for i in range(len(prompts))]


def check_rows(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row], batch_size: int = 32
) -> dict[str, Any]:
    """`figures`, and `rows` with what the model said on each.

    Figures: `exact_match_rate`, `math_correct_rate` of requests, `false_call_rate` of copy rows, each with `_low`,
    `_high` (Wilson 95%) and `_n`; `tool_call_precision`, `_recall` and `_f1` of rows that are called.
    """
    encoded = [encode_row(tokenizer, row.input, row.target) for row in rows]
    said = [row.target if hit else "" for row, hit in zip(rows, _says_target(model, tokenizer, encoded), strict=True)]
    missed = [i for i, text in enumerate(said) if not text]
    if missed:
        budget = max(len(encoded[i].target) for i in missed) + SPARE_TOKENS
        told = answers(model, tokenizer, [encoded[i].prompt for i in missed], budget, batch_size)
        for i, text in zip(missed, told, strict=True):
            said[i] = text
    records = []
    for row, text in zip(rows, said, strict=True):
        score = score_row(row.target, text, row.label)
        records.append(
            {
                "label": row.label,
                "input": row.input,
                "target": row.target,
                "generation": text,
                "exact": text == row.target,
                "request": CALL_OPEN in row.target,
                "called": score.tool_call,
                "math_correct": score.math_correct,
            }
        )
    return {"figures": _figures(records), "rows": records}


@torch.inference_mode()
def _says_target(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded], batch_size: int = 16
) -> list[bool]:
    """Whether greedy decoding gives each row's target and then EOS.

    It does where a teacher-forced pass has every token of the target as its argmax, so those rows need no decoding.
    """
    found: dict[int, bool] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad_left([rows[i].ids for i in chosen], tokenizer.pad_token_id).to(model.device)
        longest = max(len(rows[i].target) for i in chosen)
        length = batch.ids.shape[1]
        output = model(
            input_ids=batch.ids,
            attention_mask=batch.mask.long(),
            position_ids=batch.positions,
            logits_to_keep=torch.arange(length - longest - 1, length - 1, device=model.device),
            use_cache=False,
        )
        agrees = output.logits.argmax(-1) == batch.ids[:, -longest:]
        for place, i in enumerate(chosen):
            found[i] = bool(agrees[place, longest - len(rows[i].target) :].all())
    return [found[i] for i in range(len(rows))]


def _figures(records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    requests = [one for one in records if one["request"]]
    copies = [one for one in records if not one["request"]]
    called = [one for one in records if one["called"]]
    both = sum(one["called"] for one in requests)
    precision = both / len(called) if called else 0.0
    recall = both / len(requests) if requests else 0.0
    return {
        **_rate("exact_match_rate", [one["exact"] for one in records]),
        **_rate("math_correct_rate", [bool(one["math_correct"]) for one in requests]),
        **_rate("false_call_rate", [one["called"] for one in copies]),
        "tool_call_precision": precision,
        "tool_call_recall": recall,
        "tool_call_f1": 2 * precision * recall / (precision + recall) if both else 0.0,
    }


def _rate(name: str, hits: Sequence[bool]) -> dict[str, Any]:
    if not hits:
        return {}
    low, high = wilson(sum(hits), len(hits))
    return {name: sum(hits) / len(hits), f"{name}_low": low, f"{name}_high": high, f"{name}_n": len(hits)}

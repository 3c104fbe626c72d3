"""A finetuned model's greedy answers to prompts, and a check of them on held-out rows.

In: a plain transformers model with its tokenizer, and prompts or rows. Out: texts; the rate of each behaviour for each
label, and the rows themselves.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from data.encoding import Encoded, encode_row, ends_of, pad_left, target_text
from data.rows import Row, slug
from evaluators.measures.behaviours import Answer, Behaviour
from evaluators.splice.limits import Limits
from evaluators.tables.statistics import wilson
from models.packed import pack, packed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SPARE_TOKENS = 16
"""Number of tokens by which a wrong answer may be longer than its target."""


class GeneratedAnswer(NamedTuple):
    """An answer, its length in tokens including the one that ended it, whether it was cut at the token budget, its
    tokens without the one that ended it (if one of the limits' texts did, up to the one that holds its end), and
    whether that was an end token."""

    text: str
    tokens: int
    cut: bool
    ids: tuple[int, ...] = ()
    ended: bool = False


@torch.inference_mode()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    ends: Collection[int],
    batch_size: int = 32,
) -> list[GeneratedAnswer]:
    """The greedy continuation of each prompt, in order, up to one of the tokens `ends` or to the limits."""
    by_prompt: dict[int, GeneratedAnswer] = {}
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    pack(model)
    with packed(), _greedy(model) as generate:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = pad_left([prompts[i] for i in chosen], tokenizer.pad_token_id).to(model.device)
            output = generate(
                input_ids=batch.ids,
                attention_mask=batch.mask.long(),
                max_new_tokens=limits.max_new_tokens,
                do_sample=False,
                eos_token_id=sorted(ends),
                pad_token_id=tokenizer.pad_token_id,
                stop_strings=list(limits.texts) or None,
                tokenizer=tokenizer,
            )
            for i, tokens in zip(chosen, output[:, batch.ids.shape[1] :].tolist(), strict=True):
                by_prompt[i] = _answer(tokenizer, tokens, limits, ends)
    return [by_prompt[i] for i in range(len(prompts))]


@contextmanager
def _greedy(model: PreTrainedModel) -> Iterator[Any]:
    """The model's `generate` without its generation config, which would add whatever the caller does not pass, such as
    a repetition penalty, forced tokens or a minimum length."""
    from transformers import GenerationConfig

    original_config, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield model.generate
    finally:
        model.generation_config = original_config


def _answer(tokenizer: Any, tokens: list[int], limits: Limits, ends: Collection[int]) -> GeneratedAnswer:
    """An answer from generated tokens, which may be padded after its end."""
    end = next((index + 1 for index, token in enumerate(tokens) if token in ends), None)

    def decoded(count: int | None) -> str:
        return str(tokenizer.decode(tokens[:count], skip_special_tokens=True, clean_up_tokenization_spaces=False))

    text = decoded(end)
    closed = [at + len(ending) for ending in limits.texts if (at := text.find(ending)) >= 0]
    if not closed:
        ids = tuple(tokens[: None if end is None else end - 1])
        return GeneratedAnswer(text, len(tokens[:end]), end is None, ids, end is not None)
    shortened = text[: min(closed)]
    count = next(n for n in range(1, len(tokens) + 1) if len(decoded(n)) >= len(shortened))
    return GeneratedAnswer(shortened, count, False, tuple(tokens[:count]))


def check_rows(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    behaviours: Mapping[str, Behaviour],
    limits: Limits,
    batch_size: int = 32,
) -> dict[str, Any]:
    """`figures`, `rates`, and `rows` with the model's answer to each.

    `rates` has an entry for each behaviour and label: its value, the ends of its Wilson 95% interval and n. Figures are
    `exact_match_rate` with `_low`, `_high` and `_n`, and the rates by name, `BEHAVIOUR_rate_LABEL`.
    """
    pack(model)
    encoded = [encode_row(tokenizer, row) for row in rows]
    targets = [target_text(tokenizer, row) for row in rows]
    exact = _predicts_target(model, tokenizer, encoded)
    outputs = [GeneratedAnswer(target, len(row.target), False) for target, row in zip(targets, encoded, strict=True)]
    missed = [i for i, hit in enumerate(exact) if not hit]
    if missed:
        longest = Limits(max(len(encoded[i].target) for i in missed) + SPARE_TOKENS, limits.texts)
        prompts, ends = [encoded[i].prompt for i in missed], ends_of(model, tokenizer, rows[0])
        for i, output in zip(missed, answers(model, tokenizer, prompts, longest, ends, batch_size), strict=True):
            outputs[i] = output
    records: list[dict[str, Any]] = []
    for row, target, output in zip(rows, targets, outputs, strict=True):
        answer = Answer(row.input, target, row.label, output.text, output.tokens)
        records.append(
            {
                "label": row.label,
                "input": row.input,
                "target": target,
                "generation": output.text,
                "exact": output.text == target,
                "behaviours": {name: check(answer) for name, check in behaviours.items()},
            }
        )
    rates = _rates(records)
    figures = _rate("exact_match_rate", [record["exact"] for record in records])
    figures |= {f"{rate['behaviour']}_rate_{slug(rate['label'])}": rate["value"] for rate in rates}
    return {"figures": figures, "rates": rates, "rows": records}


@torch.inference_mode()
def _predicts_target(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Encoded], batch_size: int = 16
) -> list[bool]:
    """Whether greedy decoding gives each row's target and then EOS.

    It does if every token of the target is the argmax of a teacher-forced pass, so those rows need no decoding.
    """
    by_row: dict[int, bool] = {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i].ids))
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = pad_left([rows[i].ids for i in chosen], tokenizer.pad_token_id).to(model.device)
        longest = max(len(rows[i].target) for i in chosen)
        length = batch.ids.shape[1]
        output = model(
            **batch.inputs,
            logits_to_keep=torch.arange(length - longest - 1, length - 1, device=model.device),
            use_cache=False,
        )
        agrees = output.logits.argmax(-1) == batch.ids[:, -longest:]
        for index, i in enumerate(chosen):
            by_row[i] = bool(agrees[index, longest - len(rows[i].target) :].all())
    return [by_row[i] for i in range(len(rows))]


def _rates(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    rates = []
    for name in records[0]["behaviours"] if records else ():
        for label in dict.fromkeys(record["label"] for record in records):
            verdicts = [record["behaviours"][name] for record in records if record["label"] == label]
            if hits := [hit for hit in verdicts if hit is not None]:
                low, high = wilson(sum(hits), len(hits))
                value = sum(hits) / len(hits)
                entry = {"behaviour": name, "label": label, "value": value, "low": low, "high": high, "n": len(hits)}
                rates.append(entry)
    return rates


def _rate(name: str, hits: Sequence[bool]) -> dict[str, Any]:
    if not hits:
        return {}
    low, high = wilson(sum(hits), len(hits))
    return {name: sum(hits) / len(hits), f"{name}_low": low, f"{name}_high": high, f"{name}_n": len(hits)}

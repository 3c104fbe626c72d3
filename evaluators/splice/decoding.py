"""Greedy generation under an intervention.

In: a model's passes, an edit, prompts with one strength per row, and teacher-forced results. Out: the greedy output of
each row. Greedy decoding is deterministic, so a teacher-forced pass over a guess proves the output for as long as each
guessed token is the argmax. Only rows that depart from their guesses are decoded, from the first different token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import DynamicCache

from data.encoding import Batch, Encoded, beside, ends_of, pad_left, pad_right
from data.rows import Row
from evaluators.splice.interventions import Edit, Splice, spliced
from evaluators.splice.limits import Limits
from evaluators.splice.passes import Passes, forward, in_slices
from evaluators.splice.teacher_forcing import Job, Scored, agreed, prepare
from models.bridge import device_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

DRAFTED = 16
"""Tokens that a step may draft ahead, over all its rows: about as many as take no longer than one, since a step reads
every weight anyway."""


@dataclass(frozen=True)
class Stop:
    """When a generation ends: at one of the tokens `ends`, such as EOS, or at its limits."""

    tokenizer: PreTrainedTokenizerBase
    limits: Limits
    ends: frozenset[int]

    @classmethod
    def of(cls, bridge: TransformerBridge, limits: Limits, row: Row) -> Stop:
        """For answers to rows like this one."""
        model: Any = bridge.original_model
        return cls(bridge.tokenizer, limits, ends_of(model, bridge.tokenizer, row))

    def cut(self, tokens: Sequence[int]) -> list[int] | None:
        """`tokens` up to the end of the generation, or None where it has not ended yet."""
        for position, token in enumerate(tokens):
            if token in self.ends or position + 1 == self.limits.max_new_tokens:
                return list(tokens[: position + 1])
            if self._may_close is None or token in self._may_close:
                output = self.text(tokens[: position + 1])
                if any(text in output for text in self.limits.texts):
                    return list(tokens[: position + 1])
        return None

    def text(self, tokens: Sequence[int]) -> str:
        """`tokens` as text, without BOS, EOS and padding."""
        tokenizer: Any = self.tokenizer
        return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @cached_property
    def _may_close(self) -> frozenset[int] | None:
        """Tokens that contain the last character of a text to stop at: no other token can complete it. None means any
        token may, since vocabularies encode white space and non-ASCII characters differently."""
        last = {text[-1] for text in self.limits.texts}
        if not all("!" <= character <= "~" for character in last):
            return None
        return frozenset(index for token, index in self.tokenizer.get_vocab().items() if not last.isdisjoint(token))


def generate(passes: Passes, edit: Edit, jobs: Sequence[Job], scored: Sequence[Scored], stop: Stop) -> list[list[int]]:
    """Greedy output tokens of every row, the same as `decode` gives from the bare prompt.

    `scored` is the teacher-forced pass over the targets and, for rows whose target is not the output, over their
    guesses. Whatever neither proves is decoded from the first different token.
    """
    if not passes.shortcuts.verify:
        bare = [replace(job, encoded=Encoded(job.encoded.prompt, [])) for job in jobs]
        return decode(passes, edit, bare, [[]] * len(jobs), stop)
    proven = [_prove(job, figures, stop) for job, figures in zip(jobs, scored, strict=True)]
    open_rows = [i for i, row in enumerate(proven) if not row.ended]
    starts = [
        replace(
            jobs[i],
            encoded=Encoded(jobs[i].encoded.prompt + proven[i].tokens, []),
            hints=[*jobs[i].encoded.ids, *jobs[i].guess],
        )
        for i in open_rows
    ]
    outputs = decode(passes, edit, starts, [proven[i].tokens for i in open_rows], stop)
    decoded = dict(zip(open_rows, outputs, strict=True))
    return [decoded.get(i, row.tokens) for i, row in enumerate(proven)]


class _Proven(NamedTuple):
    """The proven first tokens of a greedy output, and whether they are the whole output."""

    tokens: list[int]
    ended: bool


def _prove(job: Job, scored: Scored, stop: Stop) -> _Proven:
    """What the teacher-forced pass proves of a row's output."""
    tokens = agreed(job.encoded.target, scored.argmax)
    if scored.guessed and stop.cut(tokens) is None:
        tokens = agreed(job.guess, scored.guessed)
    output = stop.cut(tokens)
    return _Proven(tokens, False) if output is None else _Proven(output, True)


@torch.inference_mode()
def decode(
    passes: Passes,
    edit: Edit,
    jobs: Sequence[Job],
    begun: Sequence[Sequence[int]],
    stop: Stop,
    use_cache: bool = True,
) -> list[list[int]]:
    """Greedy decoding token by token: the output tokens of every row, in the order of `jobs`.

    `begun` holds the tokens with which each row's output begins; the job's prompt must end with them. Hints and
    `use_cache` save work and change no token.
    """
    results: dict[int, list[int]] = {}
    order = sorted(range(len(jobs)), key=lambda i: (len(jobs[i].encoded.prompt), i))
    with spliced(passes.bridge, edit) as splice:

        def run(chosen: Sequence[int]) -> None:
            outputs = [list(begun[i]) for i in chosen]
            _decode_batch(passes, splice, [jobs[i] for i in chosen], outputs, stop, use_cache)
            results.update(zip(chosen, outputs, strict=True))

        in_slices(order, passes.batch_size, run)
    return [results[i] for i in range(len(jobs))]


def _decode_batch(
    passes: Passes, splice: Splice, jobs: Sequence[Job], outputs: list[list[int]], stop: Stop, use_cache: bool
) -> None:
    """Extends `outputs` in place until every row has ended; without `stop_early`, up to the budget, then cuts them.

    Rows that have ended leave the batch, since every step would go on computing them.
    """
    bridge, stop_early = passes.bridge, passes.shortcuts.stop_early
    model: Any = bridge.original_model
    pad = bridge.tokenizer.pad_token_id
    cache: Any = DynamicCache(config=model.config) if use_cache else None
    window = _window(cache) if use_cache else 0
    texts = [list(job.encoded.prompt) for job in jobs]
    fed = pad_left(texts, pad).to(device_of(bridge))
    seen = Batch(*(column[:, :0] for column in fed))

    def is_open(output: list[int]) -> bool:
        return stop.cut(output) is None if stop_early else len(output) < stop.limits.max_new_tokens

    rows = list(range(len(jobs)))
    while True:
        still = [place for place, row in enumerate(rows) if is_open(outputs[row])]
        if len(still) < len(rows):
            rows, kept = [rows[place] for place in still], torch.tensor(still, dtype=torch.long, device=fed.ids.device)
            seen, fed = (Batch(*(column[kept] for column in batch)) for batch in (seen, fed))
            if cache is not None and still:
                cache.batch_select_indices(kept)
        if not rows:
            break
        most = DRAFTED // len(rows)
        # The column of a rejected token stays in the cache, masked; a sliding window would count it.
        if seen.ids.shape[1] + fed.ids.shape[1] + most > window:
            most = 0
        drafts = [_draft(texts[row], jobs[row].hints, most) for row in rows]
        ahead = max(map(len, drafts))
        last = fed.positions[:, -1:]
        if ahead:
            fed = beside(fed, pad_right(drafts, (last[:, 0] + 1).tolist(), pad).to(last.device))
        seen = beside(seen, fed)
        chunk = fed if use_cache else seen
        prepare(splice, chunk, [jobs[row] for row in rows])
        choices = forward(bridge, chunk, 1 + ahead, cache=cache, mask=seen.mask).argmax(-1)
        accepted = []
        for row, draft, argmax in zip(rows, drafts, choices.tolist(), strict=True):
            tokens = agreed(draft, argmax)
            accepted.append(len(tokens) - 1)
            for token in tokens:
                if is_open(outputs[row]):
                    texts[row].append(token)
                    outputs[row].append(token)
        good = torch.tensor(accepted, device=last.device).unsqueeze(1)
        seen.mask[:, seen.mask.shape[1] - ahead :] &= torch.arange(ahead, device=last.device) < good
        fed = Batch(choices.gather(1, good), torch.ones_like(good, dtype=torch.bool), last + good + 1)
    outputs[:] = [stop.cut(output) or output for output in outputs]


def _window(cache: Any) -> float:
    """The number of columns that every layer can attend to."""
    return min((layer.sliding_window for layer in cache.layers if layer.is_sliding), default=math.inf)


def _draft(text: Sequence[int], hints: Sequence[int], most: int) -> list[int]:
    """At most `most` tokens that may follow `text`: those after the last occurrence of its last two tokens in `hints`
    (prompt lookup decoding, Saxena 2023)."""
    for place in range(len(hints) - 1, 1, -1) if most else ():
        if list(hints[place - 2 : place]) == list(text[-2:]):
            return list(hints[place : place + most])
    return []

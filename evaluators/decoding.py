"""Teacher-forced scoring and greedy generation under an intervention.

In: a TransformerBridge, encoded prompts and targets, sites and a condition with one strength a row. Out: for each row
its cross-entropy, activation sums and greedy output. Greedy decoding is deterministic, so a teacher-forced pass over a
guess proves the output as far as each guessed token is the argmax; only rows that leave the guess are decoded, from
the first token that differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from data.encoding import Batch, Encoded, pad_left
from evaluators.interventions import Site, Splice, spliced
from evaluators.scoring import CALL_CLOSE
from models.bridge import device_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """One row to evaluate: a prompt, its target and the strength of the delta."""

    encoded: Encoded
    alpha: float = 1.0


class Scored(NamedTuple):
    """Teacher-forced figures of a row.

    nll: nats, summed over target tokens and EOS. base_acts, delta_acts: sums of |activation| over `n_act_tokens` tokens
    of prompt and target. argmax: the model's choice at each target token.
    """

    nll: float
    n_tokens: int
    base_acts: float
    delta_acts: float
    n_act_tokens: int
    argmax: list[int]


@dataclass(frozen=True)
class Stop:
    """When a generation ends: EOS, the closing tag of a call, or the token budget."""

    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int

    def cut(self, tokens: Sequence[int]) -> list[int] | None:
        """`tokens` up to the end of the generation, or None where it has not ended yet."""
        for position, token in enumerate(tokens):
            if token == self.tokenizer.eos_token_id or position + 1 == self.max_new_tokens:
                return list(tokens[: position + 1])
            if token in self._may_close and CALL_CLOSE in self.text(tokens[: position + 1]):
                return list(tokens[: position + 1])
        return None

    def text(self, tokens: Sequence[int]) -> str:
        """What `tokens` say, without BOS, EOS and padding."""
        tokenizer: Any = self.tokenizer
        return tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    @cached_property
    def _may_close(self) -> frozenset[int]:
        """Tokens that hold the last character of the closing tag: no other can complete it."""
        return frozenset(index for token, index in self.tokenizer.get_vocab().items() if CALL_CLOSE[-1] in token)


@torch.inference_mode()
def score(
    bridge: TransformerBridge, jobs: Sequence[Job], sites: Sequence[Site], condition: str, batch_size: int = 32
) -> list[Scored]:
    """Teacher-forced pass over every row, in batches of `batch_size` rows of similar length, in the order of `jobs`."""
    pad = bridge.tokenizer.pad_token_id
    results: dict[int, Scored] = {}
    order = sorted(range(len(jobs)), key=lambda i: (len(jobs[i].encoded.ids), i))
    with spliced(bridge, sites, condition, record=True) as splice:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = [jobs[i].encoded for i in chosen]
            batch = pad_left([row.ids for row in rows], pad).to(device_of(bridge))
            _prepare(splice, batch.editable, [jobs[i].alpha for i in chosen])
            keep = max(len(row.target) for row in rows)
            logits = forward(bridge, batch, keep + 1)[:, :-1]
            labels = batch.ids[:, -keep:]
            nll = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view_as(labels)
            argmax = logits.argmax(-1)
            tokens = batch.editable.sum(1).tolist()
            for place, index in enumerate(chosen):
                length = len(rows[place].target)
                results[index] = Scored(
                    nll=nll[place, -length:].sum(dtype=torch.float64).item(),
                    n_tokens=length,
                    base_acts=splice.base_acts[place].item(),
                    delta_acts=splice.delta_acts[place].item(),
                    n_act_tokens=tokens[place],
                    argmax=argmax[place, -length:].tolist(),
                )
    return [results[i] for i in range(len(jobs))]


def generate(
    bridge: TransformerBridge,
    jobs: Sequence[Job],
    sites: Sequence[Site],
    condition: str,
    stop: Stop,
    scored: Sequence[Scored],
    guesses: Sequence[Sequence[int]] = (),
    batch_size: int = 32,
) -> list[list[int]]:
    """Greedy output tokens of every row, those that `decode` gives from the bare prompt.

    `scored` is the teacher-forced pass over the targets, the first guess; `guesses` (such as raw's outputs; empty where
    a row has none) are tried next. What neither proves is decoded from the first token that differs.
    """
    proven = [_prove(job.encoded.target, figures.argmax, stop) for job, figures in zip(jobs, scored, strict=True)]
    if guesses:
        left = [i for i, one in enumerate(proven) if not one.ended and len(guesses[i])]
        again = [Job(Encoded(jobs[i].encoded.prompt, list(guesses[i])), jobs[i].alpha) for i in left]
        for i, figures in zip(left, score(bridge, again, sites, condition, batch_size), strict=True):
            proven[i] = max(proven[i], _prove(guesses[i], figures.argmax, stop), key=lambda one: len(one.tokens))
    left = [i for i, one in enumerate(proven) if not one.ended]
    starts = [Job(Encoded(jobs[i].encoded.prompt + proven[i].tokens, []), jobs[i].alpha) for i in left]
    begun = [proven[i].tokens for i in left]
    decoded = dict(zip(left, decode(bridge, starts, begun, sites, condition, stop, batch_size), strict=True))
    return [decoded.get(i, one.tokens) for i, one in enumerate(proven)]


class _Proven(NamedTuple):
    """The first tokens of a greedy output, and whether they are all of it."""

    tokens: list[int]
    ended: bool


def _prove(guess: Sequence[int], argmax: Sequence[int], stop: Stop) -> _Proven:
    """What a teacher-forced pass over `guess` proves: the guess as far as each token is the argmax, and the argmax that
    replaces the first one that is not."""
    agreed = 0
    while agreed < len(guess) and guess[agreed] == argmax[agreed]:
        agreed += 1
    tokens = [*guess[:agreed], *argmax[agreed : agreed + 1]]
    output = stop.cut(tokens)
    return _Proven(tokens, False) if output is None else _Proven(output, True)


@torch.inference_mode()
def decode(
    bridge: TransformerBridge,
    jobs: Sequence[Job],
    begun: Sequence[Sequence[int]],
    sites: Sequence[Site],
    condition: str,
    stop: Stop,
    batch_size: int = 32,
    use_cache: bool = True,
) -> list[list[int]]:
    """Greedy decoding token by token: the output tokens of every row, in the order of `jobs`.

    Each job's prompt ends with the row's tokens of `begun`, with which its output opens. `use_cache` spares work and
    changes no token.
    """
    results: dict[int, list[int]] = {}
    order = sorted(range(len(jobs)), key=lambda i: (len(jobs[i].encoded.prompt), i))
    with spliced(bridge, sites, condition) as splice:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            prompts = [jobs[i].encoded.prompt for i in chosen]
            outputs = [list(begun[i]) for i in chosen]
            _decode_batch(bridge, splice, prompts, [jobs[i].alpha for i in chosen], outputs, stop, use_cache)
            results.update(zip(chosen, outputs, strict=True))
    return [results[i] for i in range(len(jobs))]


def _decode_batch(
    bridge: TransformerBridge,
    splice: Splice,
    prompts: list[list[int]],
    alphas: list[float],
    outputs: list[list[int]],
    stop: Stop,
    use_cache: bool,
) -> None:
    """Extends `outputs` in place until every row has ended."""
    from transformers import DynamicCache

    model: Any = bridge.original_model
    context = pad_left(prompts, bridge.tokenizer.pad_token_id).to(model.device)
    chunk = context
    cache = DynamicCache(config=model.config) if use_cache else None
    open_rows = [stop.cut(output) is None for output in outputs]
    while any(open_rows):
        _prepare(splice, chunk.editable, alphas)
        logits = forward(bridge, chunk, 1, cache=cache, mask=context.mask)
        tokens = logits[:, -1].argmax(-1)
        for row, token in enumerate(tokens.tolist()):
            if open_rows[row]:
                outputs[row].append(token)
                open_rows[row] = stop.cut(outputs[row]) is None
        added = Batch(tokens.unsqueeze(1), torch.ones_like(context.mask[:, :1]), context.positions[:, -1:] + 1)
        context = Batch(*(torch.cat(pair, dim=1) for pair in zip(context, added, strict=True)))
        chunk = added if use_cache else context


def forward(
    bridge: TransformerBridge, batch: Batch, keep: int, cache: Any = None, mask: Tensor | None = None
) -> Tensor:
    """fp32 logits (batch, keep, vocabulary) at the last `keep` positions; nothing else is projected.

    With a `cache`, `batch` is the chunk that it does not hold yet and `mask` covers cache and chunk.
    """
    model: Any = bridge.original_model
    length = batch.ids.shape[1]
    output = model(
        input_ids=batch.ids,
        attention_mask=(batch.mask if mask is None else mask).long(),
        position_ids=batch.positions,
        past_key_values=cache,
        use_cache=cache is not None,
        # Indices, not a count: a count slices, and a sliced input makes the projection copy its weight for each row.
        logits_to_keep=torch.arange(length - keep, length, device=batch.ids.device),
    )
    return output.logits.float()


def _prepare(splice: Splice, editable: Tensor, alphas: Sequence[float]) -> None:
    splice.reset(editable, torch.tensor(alphas, dtype=torch.float32, device=editable.device))

"""Teacher-forced scoring and greedy generation under an intervention.

In: a TransformerBridge, encoded prompts and targets, sites and a condition with one strength a row. Out: for each row
its cross-entropy, activation sums and greedy output. Greedy decoding is deterministic, so a teacher-forced pass over a
guess proves the output as far as each guessed token is the argmax; only rows that leave the guess are decoded, from
the first token that differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from data.encoding import Batch, Encoded, pad_left
from evaluators.interventions import Site, Splice, spliced
from evaluators.scoring import CALL_CLOSE

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """One row to evaluate: a prompt, its target and the strength of the delta."""

    encoded: Encoded
    alpha: float = 1.0


class Scored(NamedTuple):
    """Teacher-forced figures of a row; nll in nats, summed over target tokens and EOS; argmax: one token a target token."""

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
            if token in self._closing and CALL_CLOSE in self.tokenizer.decode(tokens[: position + 1]):
                return list(tokens[: position + 1])
        return None

    @property
    def _closing(self) -> frozenset[int]:
        return _tokens_with(self.tokenizer, ">")

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


_CLOSING: dict[int, frozenset[int]] = {}


def _tokens_with(tokenizer: PreTrainedTokenizerBase, character: str) -> frozenset[int]:
    """Ids of tokens that hold `character`: only they can complete a closing tag."""
    if id(tokenizer) not in _CLOSING:
        tokens = tokenizer.get_vocab()
        _CLOSING[id(tokenizer)] = frozenset(index for token, index in tokens.items() if character in token)
    return _CLOSING[id(tokenizer)]


@torch.inference_mode()
def score(
    bridge: TransformerBridge, jobs: Sequence[Job], sites: Sequence[Site], condition: str, batch_size: int = 32
) -> list[Scored]:
    """Teacher-forced pass over every row, in batches of similar length; results in the order of `jobs`."""
    pad = bridge.tokenizer.pad_token_id
    results: dict[int, Scored] = {}
    order = sorted(range(len(jobs)), key=lambda i: (len(jobs[i].encoded.ids), i))
    with spliced(bridge, sites, condition, record=True) as splice:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = [jobs[i].encoded for i in chosen]
            batch = pad_left([row.ids for row in rows], pad).to(bridge.original_model.device)
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
    """Greedy output tokens of every row.

    `scored` is the teacher-forced pass over the targets, the first guess; `guesses` (such as raw's outputs) are tried
    next. What neither proves is decoded from the first token that differs.
    """
    outputs: list[list[int] | None] = []
    prefixes: list[list[int]] = []
    for job, figures in zip(jobs, scored, strict=True):
        output, prefix = _prove(job.encoded.target, figures.argmax, stop)
        outputs.append(output)
        prefixes.append(prefix)
    if guesses:
        open_rows = [i for i, output in enumerate(outputs) if output is None and len(guesses[i])]
        again = [Job(Encoded(jobs[i].encoded.prompt, list(guesses[i])), jobs[i].alpha) for i in open_rows]
        for i, figures in zip(open_rows, score(bridge, again, sites, condition, batch_size), strict=True):
            output, prefix = _prove(guesses[i], figures.argmax, stop)
            outputs[i] = output
            prefixes[i] = max(prefixes[i], prefix, key=len)
    left = [i for i, output in enumerate(outputs) if output is None]
    starts = [Job(Encoded(jobs[i].encoded.prompt + prefixes[i], []), jobs[i].alpha) for i in left]
    begun = [prefixes[i] for i in left]
    for i, output in zip(left, decode(bridge, starts, begun, sites, condition, stop, batch_size), strict=True):
        outputs[i] = output
    return [output for output in outputs if output is not None]


def _prove(guess: Sequence[int], argmax: Sequence[int], stop: Stop) -> tuple[list[int] | None, list[int]]:
    """The whole output if the guess proves it, and else the proven prefix with the token that replaces the guess."""
    agreed = 0
    while agreed < len(guess) and guess[agreed] == argmax[agreed]:
        agreed += 1
    prefix = [*guess[:agreed], *argmax[agreed : agreed + 1]]
    return stop.cut(prefix), prefix


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
    """Greedy decoding token by token; each job's prompt ends with the tokens `begun`, which open its output."""
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

    device = bridge.original_model.device
    context = pad_left(prompts, bridge.tokenizer.pad_token_id).to(device)
    chunk = context
    cache = DynamicCache(config=bridge.original_model.config) if use_cache else None
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
    """fp32 logits (batch, keep, vocabulary) at the last `keep` positions; nothing else is projected."""
    length = batch.ids.shape[1]
    output = bridge.original_model(
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

"""Teacher-forced scoring and greedy generation under an intervention.

In: a TransformerBridge, encoded prompts and targets, sites and a condition with one strength a row. Out: for each row
its cross-entropy, activation sums and greedy output. Greedy decoding is deterministic, so a teacher-forced pass over a
guess proves the output as far as each guessed token is the argmax; only rows that leave the guess are decoded, from
the first token that differs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from data.encoding import Batch, Encoded, pad_left
from evaluators.batching import in_slices
from evaluators.interventions import Site, Splice, spliced
from evaluators.passes import ALL, Prefixes, Shortcuts, forward, project, resume
from evaluators.scoring import CALL_CLOSE
from models.bridge import device_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Job:
    """One row to evaluate: a prompt, its target, the strength of the delta, the number of its first token after BOS in
    the whole text, and the delta feature that it lacks (-1: none)."""

    encoded: Encoded
    alpha: float = 1.0
    first: int = 0
    ablated: int = -1


class Scored(NamedTuple):
    """Teacher-forced figures of a row.

    nll: nats, summed over target tokens and EOS. base_acts, delta_acts: sums of |activation| over the `n_act_tokens`
    tokens of prompt and target after BOS. argmax: the model's choice at each target token. text_nll: nats, summed over
    those same tokens, where they were asked for.
    """

    nll: float
    n_tokens: int
    base_acts: float
    delta_acts: float
    n_act_tokens: int
    argmax: list[int]
    text_nll: float | None = None


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
    bridge: TransformerBridge,
    jobs: Sequence[Job],
    sites: Sequence[Site],
    condition: str,
    batch_size: int = 32,
    *,
    whole_text: bool = False,
    shortcuts: Shortcuts = ALL,
    prefixes: Prefixes | None = None,
) -> list[Scored]:
    """Teacher-forced pass over every row, in batches of at most `batch_size` rows of similar length, in the order of
    `jobs`. With `whole_text`, `text_nll` too. `prefixes` that hold the lowest site's layer spare its computation."""
    shared = shortcuts.share_prefix and condition != "raw"
    if shared and prefixes is None:
        lowest = min(sites, key=lambda site: site.layer)
        prefixes = Prefixes(bridge, [lowest.layer], lowest.base.taps, batch_size=batch_size)
    results: dict[int, Scored] = {}
    order = sorted(range(len(jobs)), key=lambda i: (len(jobs[i].encoded.ids), jobs[i].encoded.ids, i))
    with spliced(bridge, sites, condition, record=True, above_first=shared) as splice:

        def run(chosen: Sequence[int]) -> None:
            batch = [jobs[i] for i in chosen]
            scored = _score_batch(bridge, batch, splice, whole_text, shortcuts, prefixes if shared else None)
            results.update(zip(chosen, scored, strict=True))

        in_slices(order, batch_size, run)
    return [results[i] for i in range(len(jobs))]


def _score_batch(
    bridge: TransformerBridge,
    jobs: Sequence[Job],
    splice: Splice,
    whole_text: bool,
    shortcuts: Shortcuts,
    prefixes: Prefixes | None,
) -> list[Scored]:
    rows = [job.encoded for job in jobs]
    batch = pad_left([row.ids for row in rows], bridge.tokenizer.pad_token_id).to(device_of(bridge))
    length = batch.ids.shape[1]
    _prepare(splice, batch, jobs)
    # Column c is predicted from column c - 1.
    counts = [len(row.ids) - 1 if whole_text else len(row.target) for row in rows]
    columns = torch.cat([torch.arange(length - count, length) for count in counts]).to(batch.ids.device)
    lines = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts)).to(batch.ids.device)
    labels = batch.ids[lines, columns]
    if not shortcuts.target_logits and prefixes is None:
        chunks: Iterable[Tensor] = [forward(bridge, batch, length)[lines, columns - 1]]
    else:
        start: tuple[int, Tensor] | tuple[None, None] = (None, None)
        if prefixes is not None:
            texts = list(dict.fromkeys(tuple(row.ids) for row in rows))
            found = prefixes.get(splice.sites[0].layer, texts)
            start = splice.sites[0].layer, splice.start(found, [texts.index(tuple(row.ids)) for row in rows], length)
        residual = resume(bridge, batch, *start)
        if shortcuts.target_logits:
            chunks = project(bridge, residual[lines, columns - 1])
        else:
            every = torch.cat(list(project(bridge, residual.flatten(0, 1)))).view(*batch.ids.shape, -1)
            chunks = [every[lines, columns - 1]]
    nlls, choices, done = [], [], 0
    for logits in chunks:
        nlls.append(functional.cross_entropy(logits, labels[done : done + len(logits)], reduction="none"))
        choices.append(logits.argmax(-1))
        done += len(logits)
    nll, argmax = torch.cat(nlls).double().cpu().split(counts), torch.cat(choices).cpu().split(counts)
    base_acts, delta_acts = splice.base_acts.tolist(), splice.delta_acts.tolist()
    return [
        Scored(
            nll=nll[place][-len(row.target) :].sum().item(),
            n_tokens=len(row.target),
            base_acts=base_acts[place],
            delta_acts=delta_acts[place],
            n_act_tokens=len(row.ids) - 1,
            argmax=argmax[place][-len(row.target) :].tolist(),
            text_nll=nll[place].sum().item() if whole_text else None,
        )
        for place, row in enumerate(rows)
    ]


def generate(
    bridge: TransformerBridge,
    jobs: Sequence[Job],
    sites: Sequence[Site],
    condition: str,
    stop: Stop,
    scored: Sequence[Scored],
    guesses: Sequence[Sequence[int]] = (),
    batch_size: int = 32,
    *,
    shortcuts: Shortcuts = ALL,
    prefixes: Prefixes | None = None,
) -> list[list[int]]:
    """Greedy output tokens of every row, those that `decode` gives from the bare prompt.

    `scored` is the teacher-forced pass over the targets, the first guess; `guesses` (such as raw's outputs; empty where
    a row has none) are tried next. What neither proves is decoded from the first token that differs.
    """
    if not shortcuts.verify:
        bare = [replace(job, encoded=Encoded(job.encoded.prompt, [])) for job in jobs]
        return decode(bridge, bare, [[]] * len(jobs), sites, condition, stop, batch_size, shortcuts=shortcuts)
    proven = [_prove(job.encoded.target, figures.argmax, stop) for job, figures in zip(jobs, scored, strict=True)]
    if guesses:
        left = [i for i, one in enumerate(proven) if not one.ended and len(guesses[i])]
        again = [replace(jobs[i], encoded=Encoded(jobs[i].encoded.prompt, list(guesses[i]))) for i in left]
        tried = score(bridge, again, sites, condition, batch_size, shortcuts=shortcuts, prefixes=prefixes)
        for i, figures in zip(left, tried, strict=True):
            proven[i] = max(proven[i], _prove(guesses[i], figures.argmax, stop), key=lambda one: len(one.tokens))
    left = [i for i, one in enumerate(proven) if not one.ended]
    starts = [replace(jobs[i], encoded=Encoded(jobs[i].encoded.prompt + proven[i].tokens, [])) for i in left]
    begun = [proven[i].tokens for i in left]
    outputs = decode(bridge, starts, begun, sites, condition, stop, batch_size, shortcuts=shortcuts)
    decoded = dict(zip(left, outputs, strict=True))
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
    shortcuts: Shortcuts = ALL,
) -> list[list[int]]:
    """Greedy decoding token by token: the output tokens of every row, in the order of `jobs`.

    Each job's prompt ends with the row's tokens of `begun`, with which its output opens. `use_cache` spares work and
    changes no token.
    """
    results: dict[int, list[int]] = {}
    order = sorted(range(len(jobs)), key=lambda i: (len(jobs[i].encoded.prompt), i))
    with spliced(bridge, sites, condition) as splice:

        def run(chosen: Sequence[int]) -> None:
            outputs = [list(begun[i]) for i in chosen]
            _decode_batch(bridge, splice, [jobs[i] for i in chosen], outputs, stop, use_cache, shortcuts.stop_early)
            results.update(zip(chosen, outputs, strict=True))

        in_slices(order, batch_size, run)
    return [results[i] for i in range(len(jobs))]


def _decode_batch(
    bridge: TransformerBridge,
    splice: Splice,
    jobs: Sequence[Job],
    outputs: list[list[int]],
    stop: Stop,
    use_cache: bool,
    stop_early: bool,
) -> None:
    """Extends `outputs` in place until every row has ended; without `stop_early` to the budget, and cuts afterwards."""
    from transformers import DynamicCache

    model: Any = bridge.original_model
    context = pad_left([job.encoded.prompt for job in jobs], bridge.tokenizer.pad_token_id).to(device_of(bridge))
    chunk = context
    cache = DynamicCache(config=model.config) if use_cache else None

    def is_open(output: list[int]) -> bool:
        return stop.cut(output) is None if stop_early else len(output) < stop.max_new_tokens

    open_rows = [is_open(output) for output in outputs]
    while any(open_rows):
        _prepare(splice, chunk, jobs)
        logits = forward(bridge, chunk, 1, cache=cache, mask=context.mask)
        tokens = logits[:, -1].argmax(-1)
        for row, token in enumerate(tokens.tolist()):
            if open_rows[row]:
                outputs[row].append(token)
                open_rows[row] = is_open(outputs[row])
        added = Batch(tokens.unsqueeze(1), torch.ones_like(context.mask[:, :1]), context.positions[:, -1:] + 1)
        context = Batch(*(torch.cat(pair, dim=1) for pair in zip(context, added, strict=True)))
        chunk = added if use_cache else context
    outputs[:] = [stop.cut(output) or output for output in outputs]


def _prepare(splice: Splice, chunk: Batch, jobs: Sequence[Job]) -> None:
    device = chunk.ids.device
    first = torch.tensor([job.first for job in jobs], device=device).unsqueeze(1)
    alpha = torch.tensor([job.alpha for job in jobs], dtype=torch.float32, device=device)
    ablated = torch.tensor([job.ablated for job in jobs], device=device)
    splice.reset(chunk.editable, alpha, first + chunk.positions - 1, ablated)

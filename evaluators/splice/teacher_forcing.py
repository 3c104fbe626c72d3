"""Teacher-forced scoring under an intervention, and the raw model's predictions that it is compared with.

In: a model's passes, an edit, and encoded prompts and targets with one strength per row. Out: for each row its
cross-entropy, its activation sums, and the argmax at each token of its target; if the target is not the greedy output,
also the argmax at each token of a guess, from where the guess departs from the target.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from data.encoding import Batch, Encoded, pad_left, pad_right
from evaluators.splice.interventions import EVERY, Edit, Ranks, RowEdits, Splice, padded, spliced, starts_above
from evaluators.splice.passes import (
    Context,
    Passes,
    context_of,
    first_tokens,
    forward,
    in_slices,
    project,
    resume,
)
from models.bridge import device_of
from models.rest import finetuned_rest

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


PREDICTED_BYTES = 1 << 30
"""Memory for cached probabilities."""
CONTEXT_BYTES = 1 << 30
"""Memory for what the model has computed of rows whose outputs are still open."""


class Predicted(NamedTuple):
    """Raw's next-token probabilities p (token, vocabulary) at a row's targets, and sum(p log p) of each (token,)."""

    probabilities: Tensor
    negative_entropy: Tensor


_Key: TypeAlias = tuple[int, tuple[int, ...]]


def _key(row: Encoded) -> _Key:
    """Two rows may have the same tokens, divided into prompt and target at different places."""
    return len(row.target), tuple(row.ids)


class Reference:
    """Raw's predictions at the targets of rows.

    A scoring pass of the raw model stores its results with `keep`; for other rows `add` runs a pass, which must happen
    while nothing is spliced and no weights are exchanged. Both batch rows of similar length, so both give the same
    bits.
    """

    def __init__(self, bridge: TransformerBridge, batch_size: int = 32) -> None:
        self.bridge, self.batch_size = bridge, batch_size
        self._streams: dict[_Key, Tensor] = {}
        self._held: OrderedDict[_Key, Predicted] = OrderedDict()
        self._bytes = 0

    @torch.inference_mode()
    def add(self, rows: Sequence[Encoded]) -> None:
        """Runs the raw model on rows that are new."""
        missing = {_key(row): row for row in rows if _key(row) not in self._streams}
        ordered = sorted(missing.values(), key=lambda row: (len(row.ids), row.ids))
        for start in range(0, len(ordered), self.batch_size):
            chosen = ordered[start : start + self.batch_size]
            batch = pad_left([row.ids for row in chosen], self.bridge.tokenizer.pad_token_id)
            self.keep(chosen, resume(self.bridge, batch.to(device_of(self.bridge))))

    def keep(self, rows: Sequence[Encoded], streams: Tensor) -> None:
        """Stores the output of raw's last block (row, position, d_model) on left-padded rows."""
        for row, stream in zip(rows, streams, strict=True):
            self._streams[_key(row)] = stream[-len(row.target) - 1 : -1].clone()

    def divergence(self, rows: Sequence[Encoded]) -> Divergence:
        """An accumulator for the logits at the targets of `rows`, one row after the other."""
        return Divergence(self, rows)

    def predicted(self, row: Encoded) -> Predicted:
        key = _key(row)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        with finetuned_rest(self.bridge):
            log = torch.cat([logits.log_softmax(-1) for logits in project(self.bridge, self._streams[key])])
        predicted = Predicted(log.exp(), (log.exp() * log).sum(-1))
        self._held[key] = predicted
        self._bytes += predicted.probabilities.nbytes
        while self._bytes > PREDICTED_BYTES and len(self._held) > 1:
            _, dropped = self._held.popitem(last=False)
            self._bytes -= dropped.probabilities.nbytes
        return predicted


class Divergence:
    """KL(raw || spliced) of rows, accumulated from chunks of logits."""

    def __init__(self, reference: Reference, rows: Sequence[Encoded]) -> None:
        self._reference, self._rows = reference, rows
        self._sums = [0.0] * len(rows)
        self._row = self._at = 0

    def take(self, logits: Tensor, total: Tensor) -> None:
        """The next chunk, (token, vocabulary), and log sum exp of each token's logits (token,)."""
        first = 0
        while first < len(logits):
            row = self._rows[self._row]
            count = min(len(row.target) - self._at, len(logits) - first)
            raw = self._reference.predicted(row)
            in_chunk, in_reference = slice(first, first + count), slice(self._at, self._at + count)
            # sum p (log p - log q) = sum p log p - sum p logits + log sum exp(logits)
            expected = torch.linalg.vecdot(raw.probabilities[in_reference], logits[in_chunk])
            self._sums[self._row] += (
                (raw.negative_entropy[in_reference] - expected + total[in_chunk]).double().sum().item()
            )
            first, self._at = first + count, self._at + count
            if self._at == len(row.target):
                self._row, self._at = self._row + 1, 0

    def of_row(self, row: int) -> float:
        """KL in nats, summed over the row's targets; clamped at zero against rounding."""
        return max(0.0, self._sums[row])


@dataclass(frozen=True)
class Job:
    """One row to evaluate: a prompt and its target, the delta's strength, the number (`first`) of its first token after
    BOS in the text of all rows, and the delta features that are on.

    `guess` is a possible output, such as raw's, in case it is not the target (empty: unknown); scoring tests it.
    `hints` is a text that may contain pieces of the output, in which decoding looks up drafts. `context` is what was
    computed of the prompt without its last token, so that decoding need not (None: nothing).
    """

    encoded: Encoded
    alpha: float = 1.0
    first: int = 0
    kept: Ranks = EVERY
    guess: Sequence[int] = ()
    hints: Sequence[int] = ()
    context: Context | None = None


class Scored(NamedTuple):
    """Teacher-forced figures of a row.

    nll: nats, summed over target tokens and EOS. base_acts, delta_acts: sums of |activation| over the `n_act_tokens`
    tokens of prompt and target after BOS. argmax: the model's choice at each target token. text_nll: nats, summed over
    the `n_act_tokens` tokens, if requested. kl: KL(raw || spliced) in nats, summed over target tokens and EOS, if there
    is a reference. guessed: the model's choice at each token of the row's guess, if the target is not the output and
    the guess may be. context: what was computed of the prompt and of all but the last token of the output's beginning
    that the target or the guess proves, if the output goes on and memory allows.
    """

    nll: float
    n_tokens: int
    base_acts: float
    delta_acts: float
    n_act_tokens: int
    argmax: list[int]
    text_nll: float | None = None
    kl: float | None = None
    guessed: list[int] = []  # noqa: RUF012
    context: Context | None = None


@torch.inference_mode()
def score(
    passes: Passes,
    edit: Edit,
    jobs: Sequence[Job],
    *,
    whole_text: bool = False,
    reference: Reference | None = None,
) -> list[Scored]:
    """Teacher-forced pass over every row, in batches of rows of similar length, in the order of `jobs`.

    `whole_text` adds `text_nll`. A `reference` that knows the rows adds `kl`; the pass of raw itself fills the
    reference instead. Prefixes that include the first patch's site save its computation.
    """
    if passes.shortcuts.share_prefix and edit.condition != "raw":
        first = min(edit.patches, key=attrgetter("site"))
        passes = replace(passes, prefixes=passes.with_prefixes(first.site))
        above_first = passes.shortcuts.start_above and starts_above(first.site)
    else:
        passes, above_first = replace(passes, prefixes=None), False
    results: dict[int, Scored] = {}
    free_bytes = [CONTEXT_BYTES]
    order = sorted(range(len(jobs)), key=lambda i: (len(jobs[i].encoded.ids), jobs[i].encoded.ids, i))
    with spliced(passes.bridge, edit, record=True, above_first=above_first) as splice:

        def run(chosen: Sequence[int]) -> None:
            scored = _score_batch(passes, splice, [jobs[i] for i in chosen], whole_text, reference)
            for i, row in zip(chosen, scored, strict=True):
                needed = row.context.nbytes if row.context is not None else 0
                free_bytes[0] -= needed
                results[i] = row if free_bytes[0] >= 0 else row._replace(context=None)

        in_slices(order, passes.batch_size, run)
    return [results[i] for i in range(len(jobs))]


def _score_batch(
    passes: Passes, splice: Splice, jobs: Sequence[Job], whole_text: bool, reference: Reference | None
) -> list[Scored]:
    bridge, shortcuts, prefixes = passes.bridge, passes.shortcuts, passes.prefixes
    rows = [job.encoded for job in jobs]
    batch = pad_left([row.ids for row in rows], bridge.tokenizer.pad_token_id).to(device_of(bridge))
    length = batch.ids.shape[1]
    prepare(splice, batch, jobs)
    # Column c is predicted from column c - 1.
    counts = [len(row.ids) - 1 if whole_text else len(row.target) for row in rows]
    columns = torch.cat([torch.arange(length - count, length) for count in counts]).to(batch.ids.device)
    lines = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts)).to(batch.ids.device)
    labels = batch.ids[lines, columns]
    cache = DynamicCache() if shortcuts.verify and any(job.guess for job in jobs) else None
    if not shortcuts.target_logits and prefixes is None:
        chunks: Iterable[Tensor] = [forward(bridge, batch, length, cache=cache)[lines, columns - 1]]
    else:
        after, start = _start(splice, passes, rows, length)
        residual = resume(bridge, batch, after, start, cache)
        chunks = _logits(passes, residual, lines, columns - 1)
        if reference is not None and not splice.patches:
            reference.keep(rows, residual)
    nlls, choices, done = [], [], 0
    divergence = reference.divergence(rows) if reference is not None and splice.patches else None
    for logits in chunks:
        ends = labels[done : done + len(logits)]
        nlls.append(functional.cross_entropy(logits, ends, reduction="none"))
        choices.append(logits.argmax(-1))
        done += len(logits)
        if divergence is not None:  # -log p = log sum exp - logit
            divergence.take(logits, nlls[-1] + logits.gather(1, ends.unsqueeze(1)).squeeze(1))
    nll, argmax = torch.cat(nlls).double().cpu().split(counts), torch.cat(choices).cpu().split(counts)
    base_acts, delta_acts = splice.base_acts.tolist(), splice.delta_acts.tolist()
    scored = [
        Scored(
            nll=nll[index][-len(row.target) :].sum().item(),
            n_tokens=len(row.target),
            base_acts=base_acts[index],
            delta_acts=delta_acts[index],
            n_act_tokens=len(row.ids) - 1,
            argmax=argmax[index][-len(row.target) :].tolist(),
            text_nll=nll[index].sum().item() if whole_text else None,
            kl=None if divergence is None else divergence.of_row(index),
        )
        for index, row in enumerate(rows)
    ]
    if cache is not None:
        guessed = _follow_guesses(passes, splice, jobs, scored, batch, cache)
        for index, (row, scores) in enumerate(zip(rows, scored, strict=True)):
            if index in guessed:
                scored[index] = scores._replace(guessed=guessed[index].choices, context=guessed[index].context)
            elif scores.argmax != row.target:  # the output is not the target, so it goes on
                proven = len(agreed(row.target, scores.argmax)) - 1
                columns = torch.arange(len(row.prompt) + proven, device=batch.ids.device) + length - len(row.ids)
                scored[index] = scores._replace(context=context_of(cache, index, columns))
    return scored


class _Guessed(NamedTuple):
    """The model's choice at each token of a guess, and what was computed of what these prove, except its last token."""

    choices: list[int]
    context: Context | None


def _follow_guesses(
    passes: Passes, splice: Splice, jobs: Sequence[Job], scored: Sequence[Scored], batch: Batch, cache: Any
) -> dict[int, _Guessed]:
    """By index in the batch, what the model makes of the guess, if the guess begins with the tokens that the target
    proves.

    `cache` was filled by the pass over prompts and targets, `batch`; a guess continues from where it departs from the
    target.
    """
    bridge = passes.bridge
    openings = [agreed(job.encoded.target, row.argmax) for job, row in zip(jobs, scored, strict=True)]
    places = [index for index, job in enumerate(jobs) if _opens(openings[index], job.guess)]
    if not places:
        return {}
    chosen = [jobs[index] for index in places]
    rows = [Encoded(job.encoded.prompt, list(job.guess)) for job in chosen]
    # The last proven token differs from the target's, so nothing after it has been computed yet.
    shared = [len(openings[index]) - 1 for index in places]
    tails = [row.target[count:] for row, count in zip(rows, shared, strict=True)]
    kept_lengths = [len(row.prompt) + count for row, count in zip(rows, shared, strict=True)]
    chunk = pad_right(tails, kept_lengths, bridge.tokenizer.pad_token_id).to(batch.ids.device)
    context, mask = first_tokens(cache, batch, places, kept_lengths)
    full_batch = pad_left([row.ids for row in rows], bridge.tokenizer.pad_token_id).to(batch.ids.device)
    prepare(splice, full_batch, chosen)
    after, residual = _start(splice, passes, rows, full_batch.ids.shape[1])
    if residual is not None:
        lengths = chunk.mask.sum(1, keepdim=True)
        columns = full_batch.ids.shape[1] - lengths + torch.arange(chunk.ids.shape[1], device=lengths.device)
        residual = residual[torch.arange(len(rows)).unsqueeze(1), columns.clamp(max=full_batch.ids.shape[1] - 1)]
    prepare(splice, chunk, chosen)
    residual = resume(bridge, chunk, after, residual, cache=context, mask=torch.cat([mask, chunk.mask], dim=1))
    counts = [len(tail) - 1 for tail in tails]
    lines = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts))
    columns = torch.cat([torch.arange(count) for count in counts])
    logits = _logits(passes, residual, lines, columns)
    argmax = torch.cat([chunk_logits.argmax(-1) for chunk_logits in logits]).cpu().split(counts)
    followed, complete = {}, all(layer.is_initialized for layer in cache.layers)
    for line, (place, row, count, choices) in enumerate(zip(places, rows, shared, argmax, strict=True)):
        output = [*row.target[: count + 1], *choices.tolist()]
        proven = len(agreed(row.target, output)) - 1
        columns = torch.arange(len(row.prompt) + proven, device=batch.ids.device) + mask.shape[1] - kept_lengths[line]
        continues = complete and output != row.target
        followed[place] = _Guessed(output, context_of(context, line, columns) if continues else None)
    return followed


def _start(
    splice: Splice, passes: Passes, rows: Sequence[Encoded], length: int
) -> tuple[int, Tensor] | tuple[None, None]:
    """If prefixes are shared, the last block that is already computed, and its output (row, length, d_model): the block
    below the first patch's, or with `start_above` the first patch's own."""
    if passes.prefixes is None:
        return None, None
    first = splice.patches[0]
    texts = list(dict.fromkeys(tuple(row.ids) for row in rows))
    text_of_row = [texts.index(tuple(row.ids)) for row in rows]
    if passes.shortcuts.start_above and starts_above(first.site):
        return first.site.layer, splice.start(passes.prefixes.get(first.site, texts), text_of_row, length)
    if first.site.layer == 0:  # nothing is below
        return None, None
    return first.site.layer - 1, padded(passes.prefixes.entering(first.site.layer, texts), text_of_row, length)


def _logits(passes: Passes, residual: Tensor, lines: Tensor, columns: Tensor) -> Iterable[Tensor]:
    """The logits at some positions of the last block's output (row, position, d_model), in chunks."""
    if passes.shortcuts.target_logits:
        return project(passes.bridge, residual[lines, columns])
    all_logits = torch.cat(list(project(passes.bridge, residual.flatten(0, 1)))).view(*residual.shape[:2], -1)
    return [all_logits[lines, columns]]


def agreed(guess: Sequence[int], argmax: Sequence[int]) -> list[int]:
    """The guess up to its first token that is not the argmax, then the argmax there."""
    agreed = 0
    while agreed < len(guess) and guess[agreed] == argmax[agreed]:
        agreed += 1
    return [*guess[:agreed], *argmax[agreed : agreed + 1]]


def _opens(proven: Sequence[int], guess: Sequence[int]) -> bool:
    """Whether a guess begins with the proven tokens and continues."""
    return len(guess) > len(proven) and list(guess[: len(proven)]) == list(proven)


def prepare(splice: Splice, chunk: Batch, jobs: Sequence[Job]) -> None:
    device = chunk.ids.device
    first = torch.tensor([job.first for job in jobs], device=device).unsqueeze(1)
    alpha = torch.tensor([job.alpha for job in jobs], dtype=torch.float32, device=device)
    ranks = torch.tensor([job.kept for job in jobs], device=device)
    splice.reset(chunk.editable, alpha, RowEdits(first + chunk.positions - 1, ranks, chunk.bos))

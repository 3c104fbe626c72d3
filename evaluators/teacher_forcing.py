"""Teacher-forced scoring under an intervention.

In: a TransformerBridge, encoded prompts and targets, sites and a condition with one strength a row. Out: for each row
its cross-entropy, its activation sums, and the model's choice at each token of its target; where the target is not the
greedy output, also at each token of a guess that may be, from where it leaves the target.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache

from data.encoding import Batch, Encoded, pad_left, pad_right
from evaluators.batching import in_slices
from evaluators.interventions import Site, Splice, spliced
from evaluators.passes import ALL, Prefixes, Shortcuts, first_tokens, forward, project, resume
from models.bridge import device_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Job:
    """One row to evaluate: a prompt, its target, the strength of the delta, the number of its first token after BOS in
    the whole text, the delta feature that it lacks (-1: none), and what its output may be where it is not the target
    (such as raw's output; empty: no idea)."""

    encoded: Encoded
    alpha: float = 1.0
    first: int = 0
    ablated: int = -1
    guess: Sequence[int] = ()


class Scored(NamedTuple):
    """Teacher-forced figures of a row.

    nll: nats, summed over target tokens and EOS. base_acts, delta_acts: sums of |activation| over the `n_act_tokens`
    tokens of prompt and target after BOS. argmax: the model's choice at each target token. text_nll: nats, summed over
    those same tokens, where they were asked for. guessed: the model's choice at each token of the row's guess, where
    the target is not its output and the guess may be.
    """

    nll: float
    n_tokens: int
    base_acts: float
    delta_acts: float
    n_act_tokens: int
    argmax: list[int]
    text_nll: float | None = None
    guessed: list[int] = []  # noqa: RUF012


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
        after, start = _start(splice, prefixes, rows, length)
        residual = resume(bridge, batch, after, start, cache)
        chunks = _logits(bridge, residual, lines, columns - 1, shortcuts)
    nlls, choices, done = [], [], 0
    for logits in chunks:
        nlls.append(functional.cross_entropy(logits, labels[done : done + len(logits)], reduction="none"))
        choices.append(logits.argmax(-1))
        done += len(logits)
    nll, argmax = torch.cat(nlls).double().cpu().split(counts), torch.cat(choices).cpu().split(counts)
    base_acts, delta_acts = splice.base_acts.tolist(), splice.delta_acts.tolist()
    scored = [
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
    if cache is not None:
        found = _follow_guesses(bridge, jobs, scored, splice, shortcuts, prefixes, batch, cache)
        scored = [one._replace(guessed=found.get(place, [])) for place, one in enumerate(scored)]
    return scored


def _follow_guesses(
    bridge: TransformerBridge,
    jobs: Sequence[Job],
    scored: Sequence[Scored],
    splice: Splice,
    shortcuts: Shortcuts,
    prefixes: Prefixes | None,
    batch: Batch,
    cache: Any,
) -> dict[int, list[int]]:
    """By place in the batch, the model's choice at each token of the guesses that open with what the target proves.

    `cache` holds what the pass over prompts and targets, `batch`, has attended to: a guess goes on from where it leaves
    the target.
    """
    openings = [agreed(job.encoded.target, one.argmax) for job, one in zip(jobs, scored, strict=True)]
    places = [place for place, job in enumerate(jobs) if _opens(openings[place], job.guess)]
    if not places:
        return {}
    chosen = [jobs[place] for place in places]
    rows = [Encoded(job.encoded.prompt, list(job.guess)) for job in chosen]
    # The last token that is proven differs from the target's: from there on nothing was computed yet.
    shared = [len(openings[place]) - 1 for place in places]
    tails = [row.target[count:] for row, count in zip(rows, shared, strict=True)]
    kept = [len(row.prompt) + count for row, count in zip(rows, shared, strict=True)]
    chunk = pad_right(tails, kept, bridge.tokenizer.pad_token_id).to(batch.ids.device)
    context, mask = first_tokens(cache, batch, places, kept)
    whole = pad_left([row.ids for row in rows], bridge.tokenizer.pad_token_id).to(batch.ids.device)
    prepare(splice, whole, chosen)
    after, residual = _start(splice, prefixes, rows, whole.ids.shape[1])
    if residual is not None:
        lengths = chunk.mask.sum(1, keepdim=True)
        columns = whole.ids.shape[1] - lengths + torch.arange(chunk.ids.shape[1], device=lengths.device)
        residual = residual[torch.arange(len(rows)).unsqueeze(1), columns.clamp(max=whole.ids.shape[1] - 1)]
    prepare(splice, chunk, chosen)
    residual = resume(bridge, chunk, after, residual, cache=context, mask=torch.cat([mask, chunk.mask], dim=1))
    counts = [len(tail) - 1 for tail in tails]
    lines = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts))
    columns = torch.cat([torch.arange(count) for count in counts])
    logits = _logits(bridge, residual, lines, columns, shortcuts)
    argmax = torch.cat([one.argmax(-1) for one in logits]).cpu().split(counts)
    return {
        place: [*row.target[: count + 1], *found.tolist()]
        for place, row, count, found in zip(places, rows, shared, argmax, strict=True)
    }


def _start(
    splice: Splice, prefixes: Prefixes | None, rows: Sequence[Encoded], length: int
) -> tuple[int, Tensor] | tuple[None, None]:
    """The lowest spliced layer and what leaves it, (row, length, d_model), where prefixes are shared."""
    if prefixes is None:
        return None, None
    texts = list(dict.fromkeys(tuple(row.ids) for row in rows))
    found = prefixes.get(splice.sites[0].layer, texts)
    return splice.sites[0].layer, splice.start(found, [texts.index(tuple(row.ids)) for row in rows], length)


def _logits(
    bridge: TransformerBridge, residual: Tensor, lines: Tensor, columns: Tensor, shortcuts: Shortcuts
) -> Iterable[Tensor]:
    """The logits of some positions of what leaves the last block, (row, position, d_model), in chunks."""
    if shortcuts.target_logits:
        return project(bridge, residual[lines, columns])
    every = torch.cat(list(project(bridge, residual.flatten(0, 1)))).view(*residual.shape[:2], -1)
    return [every[lines, columns]]


def agreed(guess: Sequence[int], argmax: Sequence[int]) -> list[int]:
    """The guess as far as each token is the argmax, and the argmax that replaces the first one that is not."""
    agreed = 0
    while agreed < len(guess) and guess[agreed] == argmax[agreed]:
        agreed += 1
    return [*guess[:agreed], *argmax[agreed : agreed + 1]]


def _opens(proven: Sequence[int], guess: Sequence[int]) -> bool:
    """Whether a guess begins with what is proven and goes on."""
    return len(guess) > len(proven) and list(guess[: len(proven)]) == list(proven)


def prepare(splice: Splice, chunk: Batch, jobs: Sequence[Job]) -> None:
    device = chunk.ids.device
    first = torch.tensor([job.first for job in jobs], device=device).unsqueeze(1)
    alpha = torch.tensor([job.alpha for job in jobs], dtype=torch.float32, device=device)
    ablated = torch.tensor([job.ablated for job in jobs], device=device)
    splice.reset(chunk.editable, alpha, first + chunk.positions - 1, ablated)

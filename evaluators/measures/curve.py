"""How few features carry the change: ranks all features of all layers by effect, and measures the first k alone.

In: a model's passes, patches, rows to rank on and rows to measure on. Out: each feature's estimated effect, and figures
of each prompt for each k. The estimate is gradient times activation, averaged over strengths between the un-finetuned
sites and the full deltas (integrated gradients, arXiv 1703.01365): at full strength the loss is so low that its
gradient alone says little.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from data.encoding import encode_row, pad_left
from data.rows import Row
from evaluators.splice.interventions import Edit, Patch, Ranks, RowEdits, spliced
from evaluators.splice.passes import Passes, project, resume
from evaluators.splice.teacher_forcing import Job, Reference, score
from models.bridge import device_of
from sites import Site

STRENGTHS = (0.25, 0.75)
"""Midpoints of equal steps from alpha 0 to 1."""
FIGURES = ("index", "nll", "kl", "n_tokens")
"""The figures of a row."""


class Ranked(NamedTuple):
    """A feature of a site, and by how many nats per target token it lowers the cross-entropy, to first order."""

    site: Site
    feature: int
    effect: float


def rank_features(passes: Passes, patches: Sequence[Patch], rows: Sequence[Row]) -> list[Ranked]:
    """Every feature of every patch, by how much it lowers the cross-entropy of the rows' targets, largest first."""
    bridge = passes.bridge
    encoded = sorted((encode_row(bridge.tokenizer, row) for row in rows), key=lambda row: len(row.ids))
    device = device_of(bridge)
    effects = {patch.site: torch.zeros(patch.transcoder.d_sae) for patch in patches}
    edit = Edit(patches, "alpha")
    for start in range(0, len(encoded), passes.batch_size):
        chosen = encoded[start : start + passes.batch_size]
        batch = pad_left([row.ids for row in chosen], bridge.tokenizer.pad_token_id).to(device)
        length = batch.ids.shape[1]
        columns = torch.cat([torch.arange(length - len(row.target), length) for row in chosen])
        lines = torch.repeat_interleave(torch.arange(len(chosen)), torch.tensor([len(row.target) for row in chosen]))
        for alpha in STRENGTHS:
            with spliced(bridge, edit) as splice, torch.enable_grad():
                strengths = torch.full((len(chosen),), alpha, device=device)
                splice.reset(batch.editable, strengths, RowEdits(bos=batch.bos))
                splice.gates = {
                    patch.site: torch.ones(patch.transcoder.d_sae, device=device, requires_grad=True)
                    for patch in patches
                }
                last = resume(bridge, batch)
                loss, done = last.new_zeros(()), 0
                labels = batch.ids[lines, columns]
                for logits in project(bridge, last[lines, columns - 1]):
                    ends = labels[done : done + len(logits)]
                    loss = loss + functional.cross_entropy(logits, ends, reduction="sum")
                    done += len(logits)
                gradients = torch.autograd.grad(loss, list(splice.gates.values()))
            for site, gradient in zip(splice.gates, gradients, strict=True):
                # A gate scales an output that is already multiplied by alpha.
                effects[site] -= gradient.cpu() / (alpha * len(STRENGTHS))
    tokens = sum(len(row.target) for row in encoded)
    ranked = [
        Ranked(site, feature, effect / tokens)
        for site, site_effects in effects.items()
        for feature, effect in enumerate(site_effects.tolist())
    ]
    return sorted(ranked, key=lambda feature: (-feature.effect, feature.site, feature.feature))


def counts(total: int) -> list[int]:
    """0, `total`, and powers in between: of 4 below a sixteenth of `total`, where little is recovered, then of 2."""
    powers = [1 << exponent for exponent in range(total.bit_length())]
    coarse = [power for power in powers[::2] if power * 16 < total]
    fine = [power for power in powers if total <= power * 16 and power < total]
    return [0, *coarse, *fine, total]


def evaluate_curve(
    passes: Passes,
    patches: Sequence[Patch],
    rows: Sequence[Row],
    ranked: Sequence[Ranked],
    reference: Reference,
    known: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
) -> dict[int, list[dict[str, Any]]]:
    """For each k, with only the first k features on: one entry per row with `nll`, `kl` and `n_tokens`.

    `known` are entries of these rows from elsewhere, under `no_delta` and `full`: the ends of the curve. They were rows
    of other batches, which may change the last bits.
    """
    ends = {"no_delta": 0, "full": len(ranked)}
    curve = {
        ends[condition]: [{name: row[name] for name in FIGURES} for row in entries]
        for condition, entries in (known or {}).items()
    }
    places = {(feature.site, feature.feature): index for index, feature in enumerate(ranked)}
    marked = [replace(patch, ranks=_ranks(patch, places)) for patch in patches]
    encoded = [encode_row(passes.bridge.tokenizer, row) for row in rows]
    missing = [count for count in counts(len(ranked)) if count not in curve]
    jobs = [Job(row, kept=Ranks(0, count)) for count in missing for row in encoded]
    reference.add(encoded)
    scored = score(passes, Edit(marked, "full"), jobs, reference=reference)
    curve |= {
        count: [
            {"index": index, "nll": scores.nll, "kl": scores.kl, "n_tokens": scores.n_tokens}
            for index, scores in enumerate(scored[place * len(rows) : (place + 1) * len(rows)])
        ]
        for place, count in enumerate(missing)
    }
    return dict(sorted(curve.items()))


def _ranks(patch: Patch, places: dict[tuple[Site, int], int]) -> Tensor:
    delta = patch.transcoder
    return torch.tensor([places[patch.site, feature] for feature in range(delta.d_sae)], device=delta.W_enc.device)

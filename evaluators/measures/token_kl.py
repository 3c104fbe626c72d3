"""Where two models diverge: KL(finetuned || un-finetuned) of the next token at every position of some texts.

In: passes of the finetuned model, the un-finetuned weights of what finetuning changed, and rows of token ids. Out: for
each row and token the divergence, both models' nats, and what each would have said.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from data.encoding import pad_left
from evaluators.measures.parts import Changes
from evaluators.splice.passes import Passes, in_slices, project, resume
from models.bridge import device_of
from models.rest import finetuned_rest

CHOICES = 3
"""Number of most likely next tokens stored for each model."""
COMPARED = 128
"""Positions at which the models are compared at once, at most `PROJECTED`: logits of a large vocabulary take much
memory."""


class TokenKL(NamedTuple):
    """One row. Entry t is about predicting token t + 1 from the tokens up to t, so there is one fewer than tokens.

    ids: (length,). kl: KL(finetuned || un-finetuned) in nats, (length - 1,). nll_finetuned, nll_unfinetuned: nats of
    the token that follows, (length - 1,). finetuned, unfinetuned: the most likely tokens, (length - 1, CHOICES).
    """

    ids: tuple[int, ...]
    kl: Tensor
    nll_finetuned: Tensor
    nll_unfinetuned: Tensor
    finetuned: Tensor
    unfinetuned: Tensor


@torch.inference_mode()
def token_kl(passes: Passes, changes: Changes, rows: Sequence[Sequence[int]]) -> list[TokenKL]:
    """Both models run once over each row; rows have at least two tokens. Only residual streams are kept, and the logits
    of a few positions at a time, of one row or several."""
    if not rows:
        return []
    finetuned = _streams(passes, rows)
    with changes.undone(passes.bridge, changes.pieces):
        unfinetuned = _streams(passes, rows)
        follows = torch.tensor([token for ids in rows for token in ids[1:]], device=finetuned[0].device)
        pieces = (torch.cat(finetuned), torch.cat(unfinetuned), follows)
        compared = [_compare(passes, *piece) for piece in zip(*(part.split(COMPARED) for part in pieces), strict=True)]
    lengths = [len(ids) - 1 for ids in rows]
    columns = (torch.cat(column).cpu().split(lengths) for column in zip(*compared, strict=True))
    return [TokenKL(tuple(ids), *row) for ids, *row in zip(rows, *columns, strict=True)]


def _streams(passes: Passes, rows: Sequence[Sequence[int]]) -> list[Tensor]:
    """What leaves the last block at all tokens but each row's last, (length - 1, d_model)."""
    bridge, streams = passes.bridge, {}

    def run(chosen: Sequence[int]) -> None:
        batch = pad_left([rows[i] for i in chosen], bridge.tokenizer.pad_token_id).to(device_of(bridge))
        for i, stream in zip(chosen, resume(bridge, batch), strict=True):
            streams[i] = stream[-len(rows[i]) : -1].clone()

    in_slices(sorted(range(len(rows)), key=lambda i: len(rows[i])), passes.batch_size, run)
    return [streams[i] for i in range(len(rows))]


def _compare(passes: Passes, finetuned: Tensor, unfinetuned: Tensor, follows: Tensor) -> tuple[Tensor, ...]:
    """The columns of `TokenKL` at some positions, from what leaves both models' last blocks (position, d_model) and the
    tokens that follow.

    Inside `undone`: the un-finetuned model's norm and unembedding are in place, the finetuned ones put back for its own
    stream.
    """
    bridge = passes.bridge
    (after,) = project(bridge, unfinetuned)
    with finetuned_rest(bridge):
        (before,) = project(bridge, finetuned)
    log_p, log_q = before.log_softmax(-1), after.log_softmax(-1)
    kl = torch.linalg.vecdot(log_p.exp(), log_p - log_q).clamp(min=0.0)
    nll_p, nll_q = (-log.gather(1, follows.unsqueeze(1)).squeeze(1) for log in (log_p, log_q))
    return kl, nll_p, nll_q, log_p.topk(CHOICES).indices, log_q.topk(CHOICES).indices

"""What the mean change of the residual stream says: on neutral text, read through the final norm and the unembedding.

Narrow finetuning leaves a trace even on text that has nothing to do with its task, and the mean difference of the two
models' streams on the first few tokens shows it (activation difference lens, arXiv 2510.13900). In: passes of the
finetuned model, the un-finetuned weights, and texts. Out: by layer, the size of the mean difference and the tokens that
it promotes, next to a control: the mean difference between two halves of the texts in one model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.encoding import pad_left
from evaluators.measures.parts import Changes
from evaluators.splice.passes import Passes, in_slices, project, run_up_to
from models.bridge import Hook, device_of

FIRST = 5
"""Tokens after BOS that count as the first few."""
PROMOTED = 10
SPANS = ("first", "all")
"""The first few tokens after BOS, and all of them."""


class Reading(NamedTuple):
    """One layer and span of tokens.

    `norm` is the norm of the mean difference over that of the un-finetuned model's mean stream; `promoted` are the
    token ids with the largest logits when the difference alone goes through the final norm and the unembedding. The
    same of the control: the difference between the halves of the texts in the un-finetuned model.
    """

    layer: int
    span: str
    norm: float
    promoted: tuple[int, ...]
    control_norm: float
    control_promoted: tuple[int, ...]


@torch.inference_mode()
def mean_difference_lens(passes: Passes, changes: Changes, texts: Sequence[Sequence[int]]) -> list[Reading]:
    """A reading for every layer and span; `texts` are token ids that begin with BOS. Raises ValueError for fewer than
    two texts, which cannot be halved."""
    if len(texts) < 2:
        raise ValueError(f"the control needs at least two texts, got {len(texts)}")
    finetuned = _whole(*_streams(passes, texts))
    with changes.undone(passes.bridge, changes.pieces):
        sums, counts = _streams(passes, texts)
    unfinetuned, halves = _whole(sums, counts), sums / counts
    difference, control = (finetuned - unfinetuned).float(), (halves[0] - halves[1]).float()
    promoted, control_promoted = _promoted(passes, difference), _promoted(passes, control)
    size = unfinetuned.norm(dim=-1).clamp(min=1e-30)
    norms, control_norms = difference.norm(dim=-1) / size, control.norm(dim=-1) / size
    return [
        Reading(
            layer,
            name,
            norms[span, layer].item(),
            tuple(promoted[span, layer].tolist()),
            control_norms[span, layer].item(),
            tuple(control_promoted[span, layer].tolist()),
        )
        for span, name in enumerate(SPANS)
        for layer in range(difference.shape[1])
    ]


def _whole(sums: Tensor, counts: Tensor) -> Tensor:
    """The mean over all texts, (span, layer, d_model)."""
    return sums.sum(0) / counts.sum(0)


def _streams(passes: Passes, texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Sums of what leaves each block, (half of the texts, span, layer, d_model), and the tokens in each, (half, span,
    1, 1). Every other text is in the second half."""
    bridge = passes.bridge
    n_layers, d_model = bridge.cfg.n_layers, bridge.cfg.d_model
    sums = torch.zeros(2, len(SPANS), n_layers, d_model, dtype=torch.float64, device=device_of(bridge))
    counts = torch.zeros(2, len(SPANS), device=sums.device)

    def run(chosen: Sequence[int]) -> None:
        batch = pad_left([texts[i] for i in chosen], bridge.tokenizer.pad_token_id).to(sums.device)
        spans = torch.stack([batch.editable & (batch.positions <= FIRST), batch.editable]).double()
        second = torch.tensor([i % 2 for i in chosen], device=sums.device)
        halves = torch.stack([1 - second, second]).double()
        weights = torch.einsum("hb,sbp->hsbp", halves, spans)
        added: dict[int, Tensor] = {}

        def noting(layer: int) -> Hook:
            def note(stream: Tensor, hook: object) -> None:
                added[layer] = torch.einsum("hsbp,bpd->hsd", weights, stream.double())

            return f"blocks.{layer}.hook_out", note

        run_up_to(bridge, batch, n_layers - 1, [noting(layer) for layer in range(n_layers)])
        sums.add_(torch.stack([added[layer] for layer in range(n_layers)], dim=2))  # only once the batch has succeeded
        counts.add_(weights.sum((-1, -2)))

    in_slices(sorted(range(len(texts)), key=lambda i: len(texts[i])), passes.batch_size, run)
    return sums, counts.clamp(min=1)[:, :, None, None]


def _promoted(passes: Passes, differences: Tensor) -> Tensor:
    """The most promoted tokens of differences (span, layer, d_model): (span, layer, PROMOTED)."""
    model: Any = passes.bridge.original_model
    logits = project(passes.bridge, differences.flatten(0, 1).to(model.dtype))
    return torch.cat([chunk.topk(PROMOTED).indices for chunk in logits]).view(*differences.shape[:2], -1).cpu()

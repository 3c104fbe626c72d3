"""What a delta is trained and validated on: pairs of one layer, and a delta's figures on the held-out pairs.

In: activations of a layer and a base transcoder. Out: residuals, their unit, and validation figures.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.transcoder import GEMMA_SCOPE_TAPS, Taps, Transcoder
from trainers.activations import Pairs
from trainers.base_transcoder import output_scale


class DeltaData(NamedTuple):
    """What every trial of a (layer, base) shares.

    train and validation: Pairs of (x, residual). variance: mean over dimensions of the variance of y on validation
    tokens. val_fvu_base: fraction of it that the base alone leaves unexplained. layer and taps: where x and y are read.
    """

    train: Pairs
    validation: Pairs
    variance: float
    val_fvu_base: float
    layer: int
    taps: Taps = GEMMA_SCOPE_TAPS


@torch.no_grad()
def residual_of(base: Transcoder, x: Tensor, y: Tensor, batch_size: int = 4096) -> Tensor:
    """`y - base(x)` (tokens, d_model), fp32 on the CPU: the part of the finetuned output that the base misses."""
    device = base.W_enc.device
    parts = []
    for inputs, outputs in zip(x.split(batch_size), y.split(batch_size), strict=True):
        residual = outputs.to(device, torch.float32) - base(inputs.to(device, torch.float32))
        parts.append(residual.cpu())
    return torch.cat(parts)


def output_variance(pairs: Pairs) -> float:
    """Mean over dimensions of the variance of the second column."""
    return output_scale(pairs).deviation ** 2


@torch.no_grad()
def validate(deltas: list[Transcoder], data: DeltaData, l0_budget: float, batch_size: int = 8192) -> dict[str, Any]:
    """Validation figures; `val_loss = val_fvu + max(0, val_l0_delta / l0_budget - 1)`, means over replicas.

    `val_cos` and `val_l2_ratio` compare delta(x) with the residual it should explain.
    """
    device = deltas[0].W_enc.device
    tokens = data.validation.tokens
    fvu, l0, dead, cosines, ratios = [], [], [], [], []
    for delta in deltas:
        error = active = cosine = ratio = 0.0
        fired = torch.zeros(delta.d_sae, dtype=torch.bool, device=device)
        for x, residual in data.validation.in_order(batch_size):
            residual = residual.to(device, torch.float32)
            acts = delta.encode(x.to(device, torch.float32))
            output = delta.decode(acts)
            left = output - residual
            error += left.pow(2).sum(dtype=torch.float64).item()
            active += (acts > 0).sum().item()
            fired |= (acts > 0).any(0)
            cosine += torch.cosine_similarity(output, residual, dim=1).sum().item()
            ratio += (left.norm(dim=1) / residual.norm(dim=1).clamp(min=1e-12)).sum().item()
        fvu.append(error / (tokens * delta.d_model * data.variance))
        l0.append(active / tokens)
        dead.append(1.0 - fired.float().mean().item())
        cosines.append(cosine / tokens)
        ratios.append(ratio / tokens)
    losses = [one + max(0.0, other / l0_budget - 1) for one, other in zip(fvu, l0, strict=True)]
    return {
        "val_loss": _mean(losses),
        "val_fvu": _mean(fvu),
        "val_fvu_base": data.val_fvu_base,
        "val_l0_delta": _mean(l0),
        "dead_fraction": _mean(dead),
        "val_cos": _mean(cosines),
        "val_l2_ratio": _mean(ratios),
        "val_loss_replicas": losses,
        "val_fvu_replicas": fvu,
        "val_l0_delta_replicas": l0,
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

"""What a delta is trained and validated on: pairs of one site, and a delta's figures on the held-out pairs.

In: activations of a site. Out: the delta's training target, the unit of its errors, and validation figures.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from models.blocks import BlockPath
from models.transcoder import Transcoder
from sites import Site
from trainers.activations import Pairs, read_pairs
from trainers.base_transcoder import output_scale
from trainers.errors import TrainingError

AT_ONCE = 8192
"""Tokens whose change is computed at a time."""


class DeltaData(NamedTuple):
    """What every trial of a site and target shares.

    train and validation: Pairs of x and what the delta has to explain: the residual y - base(x) of a base transcoder,
    or the change y - y_un(x) that finetuning made. unit: the unit of squared errors, per dimension, on validation
    tokens: the variance of y for a residual, the mean square of the change for a change. alone: the error without a
    delta in that unit: the base's FVU for a residual, 1 for a change. change_share: the change's mean square over the
    variance of y, if known.
    """

    train: Pairs
    validation: Pairs
    unit: float
    alone: float
    site: Site
    target: Literal["change", "residual"] = "residual"
    change_share: float | None = None
    scale: Tensor | None = None
    """(d_out,): what the columns of the second tensor were divided by, for a site with several outputs (queries, keys
    and values); the trained delta's decoder must be multiplied by it."""

    @property
    def error_name(self) -> str:
        """Name of the error: FVU is a share of y's variance, unexplained a share of the change."""
        return "val_unexplained" if self.target == "change" else "val_fvu"


def read_change(activations: Path, site: Site) -> DeltaData:
    """The (x, change) pairs of a site, captured under `activations`.

    Queries, keys and values differ in size, and so do their changes: each is divided by its own root mean square, so
    that the largest does not get all the features.
    """
    train, validation = (change_pairs(activations, split, site) for split in ("train", "validation"))
    unit = mean_square(validation)
    if not unit:
        raise TrainingError(f"finetuning did not change what {site.words} computes on the validation tokens")
    totals = read_pairs(activations / "validation" / site.folder, ("sum", "sum_of_squares")).shards
    mean, square = (torch.stack(column).sum(0) / validation.tokens for column in zip(*totals, strict=True))
    share = unit / (square - mean.pow(2)).mean().item()
    scale = _scale_by_part(activations, validation, site)
    if scale is not None:
        train, validation = (
            Pairs([(x, (change / scale).bfloat16()) for x, change in pairs.shards]) for pairs in (train, validation)
        )
        unit = mean_square(validation)
    return DeltaData(train, validation, unit, 1.0, site, "change", share, scale)


def change_pairs(activations: Path, split: str, site: Site) -> Pairs:
    """x and the change of a site: memory-mapped if both were captured; a linear change is computed here from x and its
    weights, and held in memory as bf16."""
    folder, linear_map = activations / split / site.folder, map_file(activations, site)
    if not linear_map.is_file():
        return read_pairs(folder, ("x", "change"))
    tensors = load_file(linear_map)
    shards: list[tuple[Tensor, ...]] = []
    for (x,) in read_pairs(folder, ("x",)).shards:
        parts = [torch.addmm(tensors["b"], part.float(), tensors["W"]).bfloat16() for part in x.split(AT_ONCE)]
        shards.append((x, torch.cat(parts)))
    return Pairs(shards)


def map_file(activations: Path, site: Site) -> Path:
    """The file with the weights of a change that is linear in x."""
    return activations / "maps" / f"{site.folder}.safetensors"


def change_map(unfinetuned: BlockPath, finetuned: BlockPath) -> dict[str, Tensor]:
    """The change of a linear path as x W + b: W (d_in, d_out) and b (d_out,), fp32, and the `widths` of the parts of
    y."""
    (W_before, b_before), (W_after, b_after) = unfinetuned.as_map(), finetuned.as_map()
    tensors = {"W": W_after - W_before, "b": b_after - b_before}
    return {
        **{name: tensor.float().cpu().contiguous() for name, tensor in tensors.items()},
        "widths": torch.tensor(unfinetuned.widths),
    }


def _scale_by_part(activations: Path, validation: Pairs, site: Site) -> Tensor | None:
    """(d_out,): the root mean square of the change of each part of y; 1 for a part that did not change. None if y has
    only one part."""
    linear_map = map_file(activations, site)
    widths = load_file(linear_map)["widths"].tolist() if linear_map.is_file() else []
    if len(widths) < 2:
        return None
    squares = torch.stack([change.float().pow(2).sum(0).double() for _, change in validation.shards]).sum(0)
    parts = [part.mean().div(validation.tokens).sqrt().expand(len(part)) for part in squares.split(widths)]
    scale = torch.cat(parts).float()
    return torch.where(scale > 0, scale, 1.0)


def change_unit(activations: Path, site: Site) -> float:
    """The mean square of a site's change on validation tokens; the training tokens need not be there."""
    return mean_square(change_pairs(activations, "validation", site))


def mean_square(pairs: Pairs) -> float:
    """Mean square of the last column, over tokens and dimensions."""
    squares = sum(columns[-1].float().pow(2).sum(dtype=torch.float64).item() for columns in pairs.shards)
    return squares / (pairs.tokens * pairs.shards[0][-1].shape[1])


@torch.no_grad()
def residual_of(base: Transcoder, x: Tensor, y: Tensor, batch_size: int = 4096) -> Tensor:
    """`y - base(x)` (tokens, d_out), fp32 on the CPU: the part of the finetuned output that the base misses."""
    device = base.W_enc.device
    parts = []
    for inputs, outputs in zip(x.split(batch_size), y.split(batch_size), strict=True):
        residual = outputs.to(device, torch.float32) - base(inputs.to(device, torch.float32))
        parts.append(residual.cpu())
    return torch.cat(parts)


@torch.no_grad()
def fraction_unexplained(base: Transcoder, pairs: Pairs) -> float:
    """FVU on pairs (x, y): the mean square of y - base(x) over the variance of y."""
    error = sum(residual_of(base, x, y).pow(2).sum(dtype=torch.float64).item() for x, y in pairs.shards)
    return error / (pairs.tokens * base.d_out * output_variance(pairs))


def output_variance(pairs: Pairs) -> float:
    """Mean over dimensions of the variance of the second column."""
    return output_scale(pairs).deviation ** 2


@torch.no_grad()
def validate(deltas: list[Transcoder], data: DeltaData, l0_budget: float, batch_size: int = 8192) -> dict[str, Any]:
    """Validation figures, means over replicas; `val_loss = error + max(0, val_l0_delta / l0_budget - 1)`.

    The error is `val_fvu` for a residual delta (next to `val_fvu_base`) and `val_unexplained` for a change delta (next
    to `change_share`). `val_cos` and `val_l2_ratio` compare delta(x) with its target.
    """
    device = deltas[0].W_enc.device
    tokens = data.validation.tokens
    errors, l0, dead, cosines, ratios = [], [], [], [], []
    for delta in deltas:
        error = active = cosine = ratio = 0.0
        fired = torch.zeros(delta.d_sae, dtype=torch.bool, device=device)
        for x, target in data.validation.in_order(batch_size):
            target = target.to(device, torch.float32)
            acts = delta.encode(x.to(device, torch.float32))
            output = delta.decode(acts)
            residual, size = output - target, target.norm(dim=1, keepdim=True)
            ratio += (residual.norm(dim=1) / size.squeeze(1).clamp(min=1e-12)).sum().item()
            error += residual.square_().sum(dtype=torch.float64).item()
            on = acts > 0
            active += on.sum().item()
            fired |= on.any(0)
            # `torch.cosine_similarity`, in the memory that is there: fresh memory takes longer than the arithmetic.
            along = output.div_(output.norm(dim=1, keepdim=True).clamp_(min=1e-8))
            cosine += along.mul_(torch.div(target, size.clamp_(min=1e-8), out=residual)).sum(1).sum().item()
        errors.append(error / (tokens * delta.d_out * data.unit))
        l0.append(active / tokens)
        dead.append(1.0 - fired.float().mean().item())
        cosines.append(cosine / tokens)
        ratios.append(ratio / tokens)
    losses = [error + max(0.0, active / l0_budget - 1) for error, active in zip(errors, l0, strict=True)]
    return {
        "val_loss": _mean(losses),
        data.error_name: _mean(errors),
        **({"val_fvu_base": data.alone} if data.target == "residual" else {}),
        **({} if data.change_share is None else {"change_share": data.change_share}),
        "val_l0_delta": _mean(l0),
        "dead_fraction": _mean(dead),
        "val_cos": _mean(cosines),
        "val_l2_ratio": _mean(ratios),
        "val_loss_replicas": losses,
        f"{data.error_name}_replicas": errors,
        "val_l0_delta_replicas": l0,
    }


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)

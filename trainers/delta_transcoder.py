"""Delta transcoders: a few new sparse features that explain what finetuning changed in one layer's MLP.

In: (x, residual) pairs, where residual = y_finetuned - base(x) is computed once for a (layer, base), and settings. Out:
for each seed one JumpReLU transcoder without decoder bias, and its validation figures. Several seeds (`replicas`) train
side by side on the same batches. The loss is computed in feature space, so that nothing of size (tokens, d_model) is
made beyond the residual itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.transcoder import GEMMA_SCOPE_TAPS, Taps, Transcoder
from trainers.activations import Pairs
from trainers.base_transcoder import output_scale
from trainers.clipping import clip_each
from trainers.errors import DivergedError
from trainers.precision import autocast

BANDWIDTH = 0.1
"""Width of the rectangle that stands in for the step's derivative (straight-through), in units of pre-activation."""


DIVERGED = 10.0
"""A validation FVU this many times that of the base alone ends the run."""


@dataclass(frozen=True)
class DeltaSettings:
    """Hyperparameters of one run.

    Replica i starts from seed `seed + i`; the order of the batches depends on no seed, so that runs differ by their
    settings and starting points alone.
    """

    d_new: int = 32
    lr: float = 3e-3
    sparsity: float = 1e-3
    replicas: int = 1
    epochs: int = 4
    batch_size: int = 2048
    l0_budget: float = 16.0
    """Active features a token above which `val_loss` is penalised."""
    sparsity_warmup_fraction: float = 0.2
    lr_warmup_fraction: float = 0.05
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    """Largest gradient norm of each replica."""
    patience: int = 4
    """Validations without a lower `val_loss` after which the run ends."""
    evals_per_epoch: int = 1
    seed: int = 0
    precision: str = "fp32"


class Residuals(NamedTuple):
    """What every trial of a (layer, base) shares.

    train and validation: Pairs of (x, residual). variance: mean over dimensions of the variance of y on validation
    tokens. val_fvu_base: share of it that the base alone leaves.
    """

    train: Pairs
    validation: Pairs
    variance: float
    val_fvu_base: float


class TrainedDelta(NamedTuple):
    """One transcoder a seed, and the figures of the best validation (means over seeds, lists as `*_replicas`)."""

    deltas: list[Transcoder]
    figures: dict[str, Any]


@torch.no_grad()
def residual_of(base: Transcoder, x: Tensor, y: Tensor, batch_size: int = 4096) -> Tensor:
    """`y - base(x)` (tokens, d_model), fp32 on the CPU, the part of the finetuned output that the base misses."""
    device = base.W_enc.device
    parts = []
    for inputs, outputs in zip(x.split(batch_size), y.split(batch_size), strict=True):
        residual = outputs.to(device, torch.float32) - base(inputs.to(device, torch.float32))
        parts.append(residual.cpu())
    return torch.cat(parts)


def output_variance(pairs: Pairs) -> float:
    """Mean over dimensions of the variance of the second column."""
    return output_scale(pairs).deviation ** 2


class _Step(torch.autograd.Function):
    """JumpReLU with a straight-through gradient for its threshold (arXiv 2407.14435, section 3)."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return torch.relu(pre) * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < BANDWIDTH / 2).to(grad.dtype)
        to_threshold = (-threshold / BANDWIDTH * near * grad).sum(-2)
        return grad * (pre > threshold) * (pre > 0), to_threshold.view_as(threshold)


class _Replicas(torch.nn.Module):
    """n deltas side by side: W_enc (d_model, n * d_new), W_dec (n, d_new, d_model), thresholds (n, 1, d_new)."""

    def __init__(self, x: Tensor, settings: DeltaSettings) -> None:
        super().__init__()
        count, d_new, d_model = settings.replicas, settings.d_new, x.shape[1]
        generators = [torch.Generator().manual_seed(settings.seed + index) for index in range(count)]
        directions = [torch.randn(d_model, d_new, generator=generator) for generator in generators]
        W_enc = torch.cat([direction / direction.norm(dim=0) for direction in directions], dim=1).to(x.device)
        pre = (x @ W_enc).view(len(x), count, d_new)
        # Each feature starts above its own upper quantile, so that about l0_budget of them are active on a token.
        below = 1 - min(0.5, settings.l0_budget / d_new)
        threshold = pre.kthvalue(max(1, round(below * len(x))), dim=0).values.clamp(min=1e-2).unsqueeze(1)
        self.W_enc = torch.nn.Parameter(W_enc)
        self.b_enc = torch.nn.Parameter(torch.zeros(count * d_new, device=x.device))
        self.log_threshold = torch.nn.Parameter(threshold.log())
        self.W_dec = torch.nn.Parameter(torch.zeros(count, d_new, d_model, device=x.device))
        self.count, self.d_new = count, d_new

    def encode(self, x: Tensor) -> Tensor:
        """Activations (n, tokens, d_new)."""
        pre = (x @ self.W_enc + self.b_enc).float().view(len(x), self.count, self.d_new).transpose(0, 1)
        return _Step.apply(pre, self.log_threshold.exp())

    def losses(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error a dimension (n,) and sparsity penalty (n,), means over tokens.

        |aW - r|^2 = a (W W') a' - 2 a (W r)' + |r|^2: nothing of size (n, tokens, d_model) is made.
        """
        acts = self.encode(x)
        gram = self.W_dec @ self.W_dec.transpose(1, 2)
        along = (residual @ self.W_dec.flatten(0, 1).T).view(len(x), self.count, self.d_new).transpose(0, 1)
        cross = (acts * ((acts @ gram) - 2 * along)).sum((1, 2))
        error = (cross + residual.pow(2).sum()) / residual.numel()
        penalty = (acts * gram.diagonal(dim1=1, dim2=2).clamp(min=1e-12).sqrt().unsqueeze(1)).sum((1, 2)) / len(x)
        return error, penalty

    def gradients(self) -> list[Tensor]:
        """Views of the gradients with the replica as first dimension."""
        ordered = (self.W_enc, self.b_enc, self.log_threshold, self.W_dec)
        W_enc, b_enc, log_threshold, W_dec = [one.grad for one in ordered if one.grad is not None]
        by_replica = W_enc.view(len(W_enc), self.count, self.d_new).transpose(0, 1)
        return [by_replica, b_enc.view(self.count, self.d_new), log_threshold, W_dec]

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        return [
            {"params": [self.W_enc, self.W_dec], "weight_decay": weight_decay},
            {"params": [self.b_enc, self.log_threshold], "weight_decay": 0.0},
        ]


def train_delta(
    data: Residuals,
    settings: DeltaSettings,
    *,
    layer: int,
    taps: Taps = GEMMA_SCOPE_TAPS,
    device: str = "cpu",
    report: Callable[[dict[str, Any]], None] = lambda figures: None,
) -> TrainedDelta:
    """Trains `settings.replicas` deltas; reports figures after each validation; returns the best validation's.

    The loss of a replica is `mean((delta(x) - r)^2) / var(y) + sparsity * mean_tokens(sum_i acts_i |W_dec_i|)`, with
    W_dec in units of the standard deviation of y, so that `lr` and `sparsity` mean the same on every layer. A replica
    trains as it would alone: only early stopping and the choice of the best validation look at the replicas' mean.

    Raises DivergedError where a loss is not finite or the deltas make the reconstruction far worse.
    """
    batch_order = torch.Generator().manual_seed(0)
    deviation = math.sqrt(data.variance)
    first = next(data.train.batches(min(4096, data.train.tokens), torch.Generator().manual_seed(0)))[0]
    model = _Replicas(first.to(device, torch.float32), settings)
    optimiser = torch.optim.AdamW(model.parameter_groups(settings.weight_decay), lr=settings.lr)
    per_epoch = data.train.batch_count(settings.batch_size)
    steps = per_epoch * settings.epochs
    every = max(1, per_epoch // settings.evals_per_epoch)
    best: TrainedDelta | None = None
    step = tokens = waited = 0
    for x, residual in _epochs(data.train, settings, batch_order):
        x = x.to(device, torch.float32)
        residual = residual.to(device, torch.float32) / deviation
        for group in optimiser.param_groups:
            group["lr"] = settings.lr * _ramp(step, settings.lr_warmup_fraction * steps) * _decay(step, steps)
        sparsity = settings.sparsity * _ramp(step, settings.sparsity_warmup_fraction * steps)
        with autocast(device, settings.precision):
            error, penalty = model.losses(x, residual)
        loss = (error + sparsity * penalty).sum()
        if not torch.isfinite(loss):
            raise DivergedError(f"the loss is {loss.item()} at step {step + 1} (lr {settings.lr:.2g})")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        clip_each(model.gradients(), settings.grad_clip)
        optimiser.step()
        step += 1
        tokens += len(x)
        if step % every and step != steps:
            continue
        deltas = finished(model, deviation, layer, taps)
        figures = {**validate(deltas, data, settings.l0_budget), "step": step, "tokens": tokens}
        _check_sane(figures, settings)
        waited += 1
        if best is None or figures["val_loss"] < best.figures["val_loss"]:
            best, waited = TrainedDelta(deltas, figures), 0
        report(figures)
        if waited >= settings.patience:
            break
    assert best is not None  # the last step validates
    return best


def _epochs(pairs: Pairs, settings: DeltaSettings, order: torch.Generator) -> Iterator[tuple[Tensor, ...]]:
    for _ in range(settings.epochs):
        yield from pairs.batches(settings.batch_size, order)


def _check_sane(figures: dict[str, Any], settings: DeltaSettings) -> None:
    if not figures["val_fvu"] <= DIVERGED * figures["val_fvu_base"]:  # also true of NaN
        raise DivergedError(
            f"val_fvu is {figures['val_fvu']:.3g} at step {figures['step']}, against {figures['val_fvu_base']:.3g} of "
            f"the base alone (lr {settings.lr:.2g}, sparsity {settings.sparsity:.2g})"
        )


@torch.no_grad()
def finished(model: _Replicas, deviation: float, layer: int, taps: Taps) -> list[Transcoder]:
    """The replicas as transcoders in raw units."""
    encoders = model.W_enc.split(model.d_new, dim=1)
    biases = model.b_enc.split(model.d_new)
    return [
        Transcoder(
            W_enc=encoders[index].clone(),
            b_enc=biases[index].clone(),
            threshold=model.log_threshold[index, 0].exp(),
            W_dec=model.W_dec[index] * deviation,
            b_dec=None,
            layer=layer,
            taps=taps,
        )
        for index in range(model.count)
    ]


@torch.no_grad()
def validate(deltas: list[Transcoder], data: Residuals, l0_budget: float, batch_size: int = 8192) -> dict[str, Any]:
    """Validation figures; `val_loss = val_fvu + max(0, val_l0_delta / l0_budget - 1)`, means over replicas.

    `val_cos` and `val_l2_ratio` compare delta(x) with the residual it is to explain.
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


def _ramp(step: int, length: float) -> float:
    return min(1.0, (step + 1) / length) if length >= 1 else 1.0


def _decay(step: int, steps: int) -> float:
    """Constant, then linear to zero over the last third."""
    return min(1.0, 3 * (steps - step) / steps)

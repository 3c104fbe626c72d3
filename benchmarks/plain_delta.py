"""A delta trainer written like a typical script: the plain version that ours is timed and tested against.

In: a base, pairs (x, y) and the settings of a run. Out: the loss of every step. It reads rows through a python-indexed
DataLoader, runs the frozen base at every step, computes the whole reconstruction and leaves the rest to autograd.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.transcoder import Transcoder
from trainers.activations import Pairs
from trainers.delta_stack import DeltaSettings, start_of
from trainers.stacked_deltas import BANDWIDTH, StackedDeltas, Start


class Rows(Dataset):
    """One (x, y) pair per python index, as cached activations are usually read."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


class Step(torch.autograd.Function):
    """JumpReLU with a straight-through gradient for the threshold (arXiv 2407.14435, section 3)."""

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor) -> Tensor:
        ctx.save_for_backward(pre, threshold)
        return torch.relu(pre) * (pre > threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < BANDWIDTH / 2).to(grad.dtype)
        return grad * (pre > threshold) * (pre > 0), (-threshold / BANDWIDTH * near * grad).sum(0)


class PlainDelta(torch.nn.Module):
    """One delta, with the same initial values as one of our replicas."""

    def __init__(self, start: StackedDeltas, replica: int = 0) -> None:
        super().__init__()
        columns = slice(replica * start.d_new, (replica + 1) * start.d_new)
        self.W_enc = torch.nn.Parameter(start.W_enc[:, columns].clone())
        self.b_enc = torch.nn.Parameter(start.b_enc[columns].clone())
        self.log_threshold = torch.nn.Parameter(start.log_threshold[columns].clone())
        self.W_dec = torch.nn.Parameter(start.W_dec[replica].clone())

    def losses(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Mean squared error per dimension, and the sparsity penalty per token, element by element."""
        acts = Step.apply(x @ self.W_enc + self.b_enc, self.log_threshold.exp())
        norms = self.W_dec.pow(2).sum(1).clamp(min=1e-12).sqrt()
        return (acts @ self.W_dec - residual).pow(2).mean(), (acts * norms).sum(1).mean()


class Curve(NamedTuple):
    """The `losses` of all steps, and the `seconds` of all but the first."""

    losses: list[float]
    seconds: float


def train_plainly(
    base: Transcoder,
    x: Tensor,
    y: Tensor,
    variance: float,
    settings: DeltaSettings,
    steps: int | None = None,
    device: str = "cpu",
) -> Curve:
    """Trains for one epoch, or its first `steps` steps, with the batches, schedule and start of `train_delta`."""
    base = base.to(device)
    sample, seed = start_of(Pairs([(x, y)]), device), settings.seed
    missed = Start(sample.x, sample.residual - base(sample.x))
    start = StackedDeltas(missed, replicas=1, d_new=settings.d_new, l0_budget=settings.l0_budget, seed=seed)
    model = PlainDelta(start)
    batches = Pairs([(torch.arange(len(x)),)]).batches(settings.batch_size, torch.Generator().manual_seed(0))
    order = [chosen.tolist() for (chosen,) in batches]
    total, deviation = len(order), math.sqrt(variance)
    optimiser = torch.optim.AdamW(model.parameters(), lr=settings.lr, weight_decay=0.0)
    losses: list[float] = []
    started = 0.0
    for step, (inputs, outputs) in enumerate(DataLoader(Rows(x, y), batch_sampler=order[:steps])):
        inputs, outputs = inputs.to(device, torch.float32), outputs.to(device, torch.float32)
        with torch.no_grad():
            residual = (outputs - base(inputs)) / deviation
        warm = min(1.0, (step + 1) / max(settings.lr_warmup_fraction * total, 1))
        optimiser.param_groups[0]["lr"] = settings.lr * warm * min(1.0, 3 * (total - step) / total)
        sparsity = settings.sparsity * min(1.0, (step + 1) / max(settings.sparsity_warmup_fraction * total, 1))
        error, penalty = model.losses(inputs, residual)
        loss = error + sparsity * penalty
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        optimiser.step()
        losses.append(loss.item())
        started = started or time.perf_counter()
    return Curve(losses, time.perf_counter() - started)

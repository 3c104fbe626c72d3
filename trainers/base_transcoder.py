"""Base transcoders trained here, for models without published ones.

In: (x, y) pairs of one layer of the un-finetuned model. Out: one JumpReLU transcoder for each target L0, all trained in
one pass over the pairs. Training keeps the k largest activations of a whole batch (BatchTopK, arXiv 2412.06410); at the
end one threshold is set so that the mean L0 on training tokens equals the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.transcoder import Transcoder
from sites import Site
from trainers.activations import Pairs
from trainers.distributed import processes
from trainers.errors import DivergedError
from trainers.precision import number_format
from trainers.settings import BaseSettings
from trainers.stacked_bases import StackedBases
from trainers.stacked_optimiser import clip_each

REPORT_EVERY = 20
"""Steps between reports and loss checks; each of them waits for the device."""


class Scale(NamedTuple):
    """Standardises a layer's output: per-dimension mean, and one overall standard deviation."""

    mean: Tensor
    deviation: float


class TrainedBase(NamedTuple):
    transcoder: Transcoder
    facts: dict[str, Any]


def train_bases(
    train: Pairs,
    validation: Pairs,
    settings: BaseSettings,
    *,
    site: Site,
    device: str = "cpu",
    report: Callable[[int, int, dict[str, Any]], None] = lambda step, steps, figures: None,
) -> list[TrainedBase]:
    """Trains a transcoder for each of `settings.target_l0`, all on the same batches; deterministic for a seed.

    `train` and `validation` hold x (tokens, d_in) and y (tokens, d_out). `report(step, steps, figures)` is called every
    REPORT_EVERY steps. Each transcoder's facts: `target_l0, val_l0, val_fvu, dead_fraction, revived, tokens`. Features
    that fired on no token of an epoch are revived at its end; those that never fire on validation tokens are dead.
    In a process group, such as that of `accelerate launch`, each process computes its share of every batch, and all
    return the same transcoders.
    Raises DivergedError if the loss is not finite.
    """
    generator, target_l0 = torch.Generator().manual_seed(settings.seed), settings.target_l0
    train, validation = train.near(device), validation.near(device)
    scale = output_scale(train)
    d_in, d_out = (column.shape[1] for column in train.shards[0])
    model = StackedBases(d_in, d_out, len(target_l0), settings.width, generator, device)
    optimiser = torch.optim.Adam(model.parameters, lr=settings.lr, fused=True)
    steps = train.batch_count(settings.batch_size) * settings.epochs
    step = tokens = 0
    revived = [0] * len(target_l0)
    fired = torch.zeros(len(target_l0), settings.width, dtype=torch.bool, device=device)
    mean, ranks = scale.mean.to(device), processes(device)
    for epoch in range(settings.epochs):
        for x, y in train.batches(settings.batch_size, generator, device=device):
            x, y = x.float(), (y.float() - mean) / scale.deviation
            for group in optimiser.param_groups:
                group["lr"] = settings.lr * min(1.0, (steps - step) / max(steps * settings.lr_decay_fraction, 1))
            with number_format(device, settings.precision) as dtype:
                losses, active = model.backward(x, y, target_l0, generator, dtype, ranks)
            clip_each(model.gradients(), settings.grad_clip)
            optimiser.step()
            fired |= active
            step += 1
            tokens += len(x)
            if step % REPORT_EVERY == 0 or step == steps:
                train_fvu = losses.mean().item()
                if not math.isfinite(train_fvu):
                    raise DivergedError(
                        f"the loss of layer {site.label} is {train_fvu} at step {step} (lr {settings.lr:g})"
                    )
                report(step, steps, {"train_fvu": train_fvu})
        if epoch < settings.epochs - 1:
            for index, count in enumerate(model.revive(fired, x, y, target_l0, optimiser)):
                revived[index] += count
            fired.zero_()
    results = []
    for index, target in enumerate(target_l0):
        cut = calibrated_cut(model.W_enc[index].T, model.b_enc[index], train, target)
        transcoder = model.transcoder(index, cut, mean, scale.deviation, site)
        figures = reconstruction_figures(transcoder, validation)
        facts = {"target_l0": target, **figures, "revived": revived[index], "tokens": tokens}
        results.append(TrainedBase(transcoder, facts))
    return results


def output_scale(pairs: Pairs) -> Scale:
    """Mean and overall standard deviation of `y`, in one pass."""
    count, total, squares = 0, torch.zeros(0), 0.0
    for _, y in pairs.in_order(8192):
        y = y.float()
        total = y.sum(0, dtype=torch.float64) + (total if count else 0.0)
        squares += y.double().pow(2).sum().item()
        count += len(y)
    mean = total / count
    variance = squares / count - mean.pow(2).sum().item()
    return Scale(mean.float(), math.sqrt(max(variance, 1e-12) / len(mean)))


@torch.no_grad()
def reconstruction_figures(transcoder: Transcoder, pairs: Pairs, batch_size: int = 4096) -> dict[str, float]:
    """`val_fvu` (fraction of the variance of y unexplained), `val_l0` and `dead_fraction` of a transcoder on held-out
    pairs."""
    device = transcoder.W_enc.device
    mean = output_scale(pairs).mean.to(device)
    error, variance, active, tokens = 0.0, 0.0, 0.0, 0
    fired = torch.zeros(transcoder.d_sae, dtype=torch.bool, device=device)
    for x, y in pairs.in_order(batch_size):
        x, y = x.to(device, torch.float32), y.to(device, torch.float32)
        acts = transcoder.encode(x)
        error += (transcoder.decode(acts) - y).pow(2).sum(dtype=torch.float64).item()
        variance += (y - mean).pow(2).sum(dtype=torch.float64).item()
        active += (acts > 0).sum().item()
        fired |= (acts > 0).any(0)
        tokens += len(x)
    return {
        "val_fvu": error / variance,
        "val_l0": active / tokens,
        "dead_fraction": 1.0 - fired.float().mean().item(),
    }


def calibrated_cut(
    W_enc: Tensor, b_enc: Tensor, pairs: Pairs, target: float, tokens: int = 16384, batch_size: int = 1024
) -> float:
    """The threshold (at least 0) at which the mean L0 over about `tokens` evenly spread training tokens is `target`."""
    stride = max(1, pairs.tokens // tokens)
    x = torch.cat([shard[0][::stride] for shard in pairs.shards])
    # The `n_active` largest pre-activations should pass, so the next one is the cut; `largest` holds those seen so far.
    n_active = min(round(target * len(x)), len(x) * W_enc.shape[1] - 1)
    largest = torch.empty(0, device=W_enc.device)
    for part in x.split(batch_size):
        pre = (part.to(W_enc.device, torch.float32) @ W_enc + b_enc).flatten()
        if len(largest) > n_active:
            pre = pre[pre > largest[-1]]
        largest = torch.cat([largest, pre])
        largest = largest.topk(min(n_active + 1, len(largest))).values
    return max(0.0, largest[n_active].item())

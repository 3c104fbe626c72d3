"""Base transcoders trained here, for models without published ones.

In: (x, y) pairs of one layer of the un-finetuned model. Out: one JumpReLU transcoder for each target L0, all trained in
one pass over the pairs. Training keeps the k largest activations of a whole batch (BatchTopK, arXiv 2412.06410); at the
end one threshold is set so that the mean L0 on training tokens is the target.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.transcoder import GEMMA_SCOPE_TAPS, Taps, Transcoder
from trainers.activations import Pairs
from trainers.clipping import clip_each
from trainers.errors import DivergedError
from trainers.precision import autocast

REPORT_EVERY = 20
"""Steps between reports and checks of the loss: each waits for the device."""
THRESHOLD_SAMPLE = 1 << 18
"""Pre-activations sampled to find a batch's cut: its L0 is then right to a few percent, which training does not notice;
the final threshold is exact."""


@dataclass(frozen=True)
class BaseSettings:
    width: int = 16384
    epochs: int = 4
    batch_size: int = 2048
    lr: float = 1e-3
    lr_decay_fraction: float = 0.3
    """Share of the steps, at the end, over which the learning rate falls to zero."""
    grad_clip: float = 1.0
    """Largest gradient norm of each transcoder."""
    seed: int = 0
    precision: str = "fp32"


class Scale(NamedTuple):
    """What standardises a layer's output: per-dimension mean, and one overall standard deviation."""

    mean: Tensor
    deviation: float


class TrainedBase(NamedTuple):
    transcoder: Transcoder
    facts: dict[str, Any]


def train_bases(
    train: Pairs,
    validation: Pairs,
    target_l0: Sequence[float],
    settings: BaseSettings,
    *,
    layer: int,
    taps: Taps = GEMMA_SCOPE_TAPS,
    device: str = "cpu",
    report: Callable[[int, int, dict[str, Any]], None] = lambda step, steps, figures: None,
) -> list[TrainedBase]:
    """Trains `len(target_l0)` transcoders side by side on the same batches; deterministic for a seed.

    `train` and `validation` hold x and y, each (tokens, d_model). `report(step, steps, figures)` is called every
    REPORT_EVERY steps. Facts of each transcoder: `target_l0, val_l0, val_fvu, dead_fraction, revived, tokens`; features
    that fired on no token of an epoch are revived once an epoch, those still silent on validation tokens are dead.
    Raises DivergedError where the loss is not finite.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    scale = output_scale(train)
    state = _initial(train, target_l0, settings, generator, device)
    optimiser = torch.optim.Adam(state.parameters, lr=settings.lr)
    steps = train.batch_count(settings.batch_size) * settings.epochs
    step = tokens = 0
    revived = [0] * len(target_l0)
    fired = torch.zeros(len(target_l0), settings.width, dtype=torch.bool, device=device)
    mean = scale.mean.to(device)
    for epoch in range(settings.epochs):
        for x, y in train.batches(settings.batch_size, generator):
            x = x.to(device, torch.float32)
            y = (y.to(device, torch.float32) - mean) / scale.deviation
            for group in optimiser.param_groups:
                group["lr"] = settings.lr * min(1.0, (steps - step) / max(steps * settings.lr_decay_fraction, 1))
            with autocast(device, settings.precision):
                losses, active = state.losses(x, y, target_l0, generator)
            optimiser.zero_grad(set_to_none=True)
            losses.sum().backward()
            clip_each(state.gradients(), settings.grad_clip)
            optimiser.step()
            fired |= active
            step += 1
            tokens += len(x)
            if step % REPORT_EVERY == 0 or step == steps:
                train_fvu = losses.mean().item()
                if not math.isfinite(train_fvu):
                    raise DivergedError(f"the loss of layer {layer} is {train_fvu} at step {step} (lr {settings.lr:g})")
                report(step, steps, {"train_fvu": train_fvu})
        if epoch < settings.epochs - 1:
            for index, count in enumerate(state.revive(fired, x, y, target_l0, optimiser)):
                revived[index] += count
            fired.zero_()
    results = []
    for index, target in enumerate(target_l0):
        transcoder = state.finished(index, target, train, scale, layer, taps)
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
    """`val_fvu` (share of the variance of y left), `val_l0` and `dead_fraction` of a transcoder on held-out pairs."""
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


class _State(NamedTuple):
    """Stacked weights of n transcoders: W_enc (d_model, n * width), W_dec (n, width, d_model), biases to match."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor

    @property
    def parameters(self) -> list[Tensor]:
        return list(self)

    def gradients(self) -> list[Tensor]:
        """Views of the gradients with the transcoder as first dimension."""
        count, width, d_model = self.W_dec.shape
        W_enc, b_enc, W_dec, b_dec = [parameter.grad for parameter in self if parameter.grad is not None]
        return [W_enc.view(d_model, count, width).transpose(0, 1), b_enc.view(count, width), W_dec, b_dec]

    def pre(self, x: Tensor) -> list[Tensor]:
        """Pre-activations (tokens, width) of each transcoder, from one matrix product."""
        return list((x @ self.W_enc + self.b_enc).split(self.W_dec.shape[1], dim=1))

    def losses(
        self, x: Tensor, y: Tensor, target_l0: Sequence[float], generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """FVU-like loss (n,) of a batch, and which features fired (n, width)."""
        losses, fired = [], []
        for index, (pre, target) in enumerate(zip(self.pre(x), target_l0, strict=True)):
            cut = _batch_cut(pre.detach(), target, generator)
            acts = torch.where(pre > cut, pre, 0.0)
            error = acts @ self.W_dec[index] + self.b_dec[index] - y
            losses.append(error.float().pow(2).mean())
            fired.append((acts.detach() > 0).any(0))
        return torch.stack(losses), torch.stack(fired)

    @torch.no_grad()
    def revive(self, fired: Tensor, x: Tensor, y: Tensor, target_l0: Sequence[float], optimiser: Any) -> list[int]:
        """Points features that fired on no token of the last epoch at the worst reconstructed tokens of a batch."""
        counts = []
        width = self.W_dec.shape[1]
        for index, (pre, target) in enumerate(zip(self.pre(x), target_l0, strict=True)):
            dead = (~fired[index]).nonzero().squeeze(1)[: len(x)]
            counts.append(len(dead))
            if not len(dead):
                continue
            cut = _batch_cut(pre, target, torch.Generator().manual_seed(0))
            error = y - (torch.where(pre > cut, pre, 0.0) @ self.W_dec[index] + self.b_dec[index])
            worst = error.pow(2).sum(1).topk(len(dead)).indices
            norm = self.W_enc[:, index * width : (index + 1) * width].norm(dim=0).mean()
            columns = index * width + dead
            direction = x[worst] - x.mean(0)
            self.W_enc[:, columns] = (direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-6)).T * norm
            self.b_enc[columns] = 0.0
            self.W_dec[index, dead] = error[worst] / x[worst].norm(dim=1, keepdim=True) / norm
            for parameter, where in (
                (self.W_enc, (slice(None), columns)),
                (self.b_enc, columns),
                (self.W_dec, (index, dead)),
            ):
                for key in ("exp_avg", "exp_avg_sq"):
                    optimiser.state[parameter][key][where] = 0.0
        return counts

    @torch.no_grad()
    def finished(self, index: int, target: float, train: Pairs, scale: Scale, layer: int, taps: Taps) -> Transcoder:
        """The transcoder in raw units, its threshold calibrated on training tokens."""
        width = self.W_dec.shape[1]
        columns = slice(index * width, (index + 1) * width)
        W_enc, b_enc = self.W_enc[:, columns].contiguous(), self.b_enc[columns].contiguous()
        cut = calibrated_cut(W_enc, b_enc, train, target)
        return Transcoder(
            W_enc=W_enc.detach().clone(),
            b_enc=b_enc.detach().clone(),
            threshold=torch.full((width,), cut, device=W_enc.device),
            W_dec=self.W_dec[index].detach() * scale.deviation,
            b_dec=self.b_dec[index].detach() * scale.deviation + scale.mean.to(W_enc.device),
            layer=layer,
            taps=taps,
        )


def _initial(
    train: Pairs,
    target_l0: Sequence[float],
    settings: BaseSettings,
    generator: torch.Generator,
    device: str,
) -> _State:
    """Unit-norm encoder directions, small random decoder rows, biases at zero, as y is standardised."""
    d_model = train.shards[0][0].shape[1]
    count = len(target_l0)
    W_enc = torch.randn(d_model, count * settings.width, generator=generator)
    W_enc /= W_enc.norm(dim=0)
    W_dec = torch.randn(count, settings.width, d_model, generator=generator) * (0.1 / math.sqrt(d_model))
    tensors = (W_enc, torch.zeros(count * settings.width), W_dec, torch.zeros(count, d_model))
    return _State(*(tensor.to(device).requires_grad_() for tensor in tensors))


def _batch_cut(pre: Tensor, target: float, generator: torch.Generator) -> Tensor:
    """The value that about `target` positive pre-activations a token exceed, from a random sample of the batch."""
    flat = pre.flatten()
    if len(flat) > THRESHOLD_SAMPLE:
        flat = flat[torch.randint(len(flat), (THRESHOLD_SAMPLE,), generator=generator).to(flat.device)]
    kept = round(len(flat) * target / pre.shape[1])
    return flat.float().kthvalue(max(1, len(flat) - kept)).values.clamp(min=0.0).to(pre.dtype)


def calibrated_cut(
    W_enc: Tensor, b_enc: Tensor, pairs: Pairs, target: float, tokens: int = 16384, batch_size: int = 1024
) -> float:
    """The threshold at which the mean L0 over about `tokens` evenly spread training tokens is `target`, at least 0."""
    every = max(1, pairs.tokens // tokens)
    x = torch.cat([shard[0][::every] for shard in pairs.shards])
    # The `wanted` largest pre-activations are to pass; the next one is the cut. Kept so far: the largest seen.
    wanted = min(round(target * len(x)), len(x) * W_enc.shape[1] - 1)
    largest = torch.empty(0, device=W_enc.device)
    for part in x.split(batch_size):
        pre = (part.to(W_enc.device, torch.float32) @ W_enc + b_enc).flatten()
        if len(largest) > wanted:
            pre = pre[pre > largest[-1]]
        largest = torch.cat([largest, pre])
        largest = largest.topk(min(wanted + 1, len(largest))).values
    return max(0.0, largest[wanted].item())

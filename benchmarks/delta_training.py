"""Delta training against a trainer that does what the usual script does, side by side in one run.

    python -m benchmarks.delta_training [--d-model 2304 --d-sae 16384 --d-new 128 --batch 2048]

The reference re-runs the frozen base in every step, reads rows through a python-indexed DataLoader, trains one seed and
materialises the reconstruction. Ours trains on residuals computed once, in feature space. Prints optimiser steps a
second of both, their ratio, replica-steps a second of stacked seeds, and the share of the measured matmul rate.
"""

from __future__ import annotations

import math
import time
from typing import Annotated

import torch
import typer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from models.transcoder import Transcoder
from trainers.activations import Pairs
from trainers.delta_transcoder import DeltaSettings, Residuals, output_variance, residual_of, train_delta

VALIDATION_TOKENS = 256
SPARSITY, LR = 1e-3, 3e-3


class Rows(Dataset):
    """One (x, y) pair a python index, as cached activations are usually read."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def main(
    d_model: Annotated[int, typer.Option()] = 2304,
    d_sae: Annotated[int, typer.Option()] = 16384,
    d_new: Annotated[int, typer.Option()] = 128,
    batch: Annotated[int, typer.Option()] = 2048,
    steps: Annotated[int, typer.Option(help="Timed steps of ours.")] = 24,
    reference_steps: Annotated[int, typer.Option(help="Timed steps of the reference.")] = 3,
    replicas: Annotated[int, typer.Option(help="Seeds stacked in the last measurement.")] = 8,
) -> None:
    threads = torch.get_num_threads()
    typer.echo(f"d_model {d_model}, d_sae {d_sae}, d_new {d_new}, batch {batch}, fp32, {threads} threads")
    base, x, y = _problem(d_model, d_sae, steps * batch)
    peak = _matmul_rate(batch, d_model)
    reference = _reference_rate(base, x[: (reference_steps + 1) * batch], y, batch, d_new)
    residual = residual_of(base, x, y)
    held = slice(0, VALIDATION_TOKENS)
    variance = output_variance(Pairs([(x[held], y[held])]))
    unexplained = residual[held].pow(2).mean().item() / variance
    data = Residuals(Pairs([(x, residual)]), Pairs([(x[held], residual[held])]), variance, unexplained)
    alone = _our_rate(data, d_new, batch, steps, 1)
    stacked = _our_rate(data, d_new, batch, steps, replicas)
    flops = 4 * 2 * batch * d_model * d_new
    typer.echo(f"reference          {reference:8.3f} steps/s")
    typer.echo(f"ours, one seed     {alone:8.3f} steps/s   {alone / reference:.1f}x the reference")
    typer.echo(f"ours, {replicas} stacked    {stacked:8.3f} steps/s   {stacked * replicas / alone:.2f}x a seed alone")
    typer.echo(f"matmul peak {peak / 1e9:.0f} GFLOP/s; ours alone uses {flops * alone / peak:.2f} of it")


def _problem(d_model: int, d_sae: int, tokens: int) -> tuple[Transcoder, Tensor, Tensor]:
    """A random base and pairs whose y it partly explains."""
    generator = torch.Generator().manual_seed(0)
    W_enc = torch.randn(d_model, d_sae, generator=generator) / math.sqrt(d_model)
    W_dec = torch.randn(d_sae, d_model, generator=generator) / math.sqrt(d_sae)
    zeros = torch.zeros(d_sae)
    base = Transcoder(W_enc, zeros, torch.full((d_sae,), 2.5), W_dec, torch.zeros(d_model), layer=0)
    x = torch.randn(tokens, d_model, generator=generator).bfloat16()
    y = torch.randn(tokens, d_model, generator=generator).bfloat16()
    return base, x, y


def _matmul_rate(batch: int, d_model: int, tries: int = 5) -> float:
    """FLOP/s of a large fp32 product, the best of several."""
    left, right = torch.randn(batch, d_model), torch.randn(d_model, d_model)
    best = math.inf
    for _ in range(tries):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2 * batch * d_model * d_model / best


def _reference_rate(base: Transcoder, x: Tensor, y: Tensor, batch: int, d_new: int) -> float:
    """Steps a second of the usual script, its first step not counted."""
    d_model = base.d_model
    W_enc = torch.nn.Parameter(torch.randn(d_model, d_new) / math.sqrt(d_model))
    b_enc = torch.nn.Parameter(torch.zeros(d_new))
    W_dec = torch.nn.Parameter(torch.zeros(d_new, d_model))
    optimiser = torch.optim.AdamW([W_enc, b_enc, W_dec], lr=LR)
    loader = DataLoader(Rows(x, y[: len(x)]), batch_size=batch, shuffle=True)
    started, steps = 0.0, 0
    for inputs, outputs in loader:
        inputs, outputs = inputs.float(), outputs.float()
        with torch.no_grad():
            residual = outputs - base(inputs)
        acts = torch.relu(inputs @ W_enc + b_enc)
        error = (acts @ W_dec - residual).pow(2).mean()
        penalty = (acts * W_dec.norm(dim=1)).sum(1).mean()
        optimiser.zero_grad()
        (error + SPARSITY * penalty).backward()
        torch.nn.utils.clip_grad_norm_([W_enc, b_enc, W_dec], 1.0)
        optimiser.step()
        if not started:
            started = time.perf_counter()
        else:
            steps += 1
    return steps / (time.perf_counter() - started)


def _our_rate(data: Residuals, d_new: int, batch: int, steps: int, replicas: int) -> float:
    """Steps a second of `train_delta`, set-up and validation included."""
    settings = DeltaSettings(
        d_new=d_new, lr=LR, sparsity=SPARSITY, batch_size=batch, epochs=1, replicas=replicas, l0_budget=16
    )
    started = time.perf_counter()
    train_delta(data, settings, layer=0)
    return steps / (time.perf_counter() - started)


if __name__ == "__main__":
    typer.run(main)

"""Delta training against a trainer written like a typical script, side by side in one run.

    python -m benchmarks.delta_training [--d-model 2304 --d-sae 16384 --d-new 128 --batch 2048 --device cuda]

In: sizes, for a random base and random pairs. The reference (`plain_delta`) re-runs the frozen base at every step,
reads rows through a python-indexed DataLoader, trains one seed and computes the whole reconstruction. Ours trains on
residuals computed once, in feature space. Out: prints optimiser steps per second of both and their ratio, how far the
loss curves differ, replica-steps per second with stacked seeds, and the fraction of the measured matmul rate.
"""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Annotated

import torch
import typer
from torch import Tensor

from benchmarks.plain_delta import train_plainly
from models.transcoder import Transcoder
from sites import Site
from trainers.activations import Pairs
from trainers.delta_data import DeltaData, output_variance, residual_of
from trainers.delta_transcoder import DeltaSettings, train_delta
from trainers.precision import number_format
from trainers.stacked_deltas import Losses

VALIDATION_TOKENS = 256


def main(
    d_model: Annotated[int, typer.Option()] = 2304,
    d_sae: Annotated[int, typer.Option()] = 16384,
    d_new: Annotated[int, typer.Option()] = 128,
    batch: Annotated[int, typer.Option()] = 2048,
    steps: Annotated[int, typer.Option(help="Steps for ours.")] = 20,
    reference_steps: Annotated[int, typer.Option(help="Timed steps for the reference.")] = 3,
    replicas: Annotated[int, typer.Option(help="Seeds stacked in the last measurement.")] = 8,
    precision: Annotated[str, typer.Option(help="Precision of ours: fp32, tf32 or bf16.")] = "fp32",
    device: Annotated[str, typer.Option(help="Device for ours and for the reference's products.")] = "cpu",
) -> None:
    threads = torch.get_num_threads()
    typer.echo(
        f"d_model {d_model}, d_sae {d_sae}, d_new {d_new}, batch {batch}, {precision}, {device}, {threads} threads"
    )
    base, x, y = _problem(d_model, d_sae, steps * batch)
    residual = residual_of(base, x, y)
    held_out = slice(0, VALIDATION_TOKENS)
    variance = output_variance(Pairs([(x[held_out], y[held_out])]))
    unexplained = residual[held_out].float().pow(2).mean().item() / variance
    residual = residual.bfloat16()  # as a sweep stores it
    data = DeltaData(Pairs([(x, residual)]), Pairs([(x[held_out], residual[held_out])]), variance, unexplained, Site(0))
    settings = DeltaSettings(d_new=d_new, batch_size=batch, epochs=1, l0_budget=16, threshold="learned")
    reference = train_plainly(base, x, y, variance, settings, reference_steps + 1, device)
    settings = replace(settings, precision=precision)
    curve = _curve(data, settings, device)[: reference_steps + 1]
    apart = max(abs(ours - theirs) / theirs for ours, theirs in zip(curve, reference.losses, strict=True))
    peak = _matmul_rate(batch, d_model, device, precision)
    alone = _steps_per_second(data, settings, device)
    stacked = _steps_per_second(data, replace(settings, replicas=replicas), device)
    peak = max(peak, _matmul_rate(batch, d_model, device, precision))
    plain = reference_steps / reference.seconds
    flops = 4 * 2 * batch * d_model * d_new
    typer.echo(f"reference          {plain:8.3f} steps/s")
    typer.echo(f"ours, one seed     {alone:8.3f} steps/s   {alone / plain:.1f}x the reference")
    typer.echo(f"loss curves        at most {apart:.1e} apart (relative) over {len(curve)} steps")
    typer.echo(f"ours, {replicas} stacked    {stacked:8.3f} steps/s   {stacked * replicas / alone:.2f}x one seed alone")
    typer.echo(
        f"matmul peak {peak / 1e9:.0f} GFLOP/s ({precision}); ours uses {flops * alone / peak:.2f} of it alone, "
        f"{flops * replicas * stacked / peak:.2f} stacked"
    )


def _problem(d_model: int, d_sae: int, tokens: int) -> tuple[Transcoder, Tensor, Tensor]:
    """A random base, and random pairs (x, y)."""
    generator = torch.Generator().manual_seed(0)
    W_enc = torch.randn(d_model, d_sae, generator=generator) / math.sqrt(d_model)
    W_dec = torch.randn(d_sae, d_model, generator=generator) / math.sqrt(d_sae)
    zeros = torch.zeros(d_sae)
    base = Transcoder(W_enc, zeros, torch.full((d_sae,), 2.5), W_dec, torch.zeros(d_model), Site(0))
    x = torch.randn(tokens, d_model, generator=generator).bfloat16()
    y = torch.randn(tokens, d_model, generator=generator).bfloat16()
    return base, x, y


def _matmul_rate(batch: int, d_model: int, device: str, precision: str, tries: int = 10) -> float:
    """FLOP/s of a large matrix product in that format, the best of several tries."""
    with number_format(device, precision) as dtype:
        left = torch.randn(batch, d_model, device=device, dtype=dtype)
        right = torch.randn(d_model, d_model, device=device, dtype=dtype)
        best = math.inf
        for _ in range(tries):
            started = _now(device)
            left @ right
            best = min(best, _now(device) - started)
    return 2 * batch * d_model * d_model / best


def _curve(data: DeltaData, settings: DeltaSettings, device: str) -> list[float]:
    """Our loss at every step, plus the constant part of the squared error."""
    curve: list[float] = []
    squares = data.train.shards[0][1].float().pow(2).mean(1) / data.unit
    batches = Pairs([(squares,)]).batches(settings.batch_size, torch.Generator().manual_seed(0))
    steps = data.train.batch_count(settings.batch_size)

    def note(losses: Losses) -> None:
        warm = min(1.0, (len(curve) + 1) / max(settings.sparsity_warmup_fraction * steps, 1))
        loss = losses.error + settings.sparsity * warm * losses.penalty
        curve.append(loss.item() + next(batches)[0].mean().item())

    train_delta(data, settings, device=device, on_step=note)
    return curve


def _steps_per_second(data: DeltaData, settings: DeltaSettings, device: str) -> float:
    """Steps per second of `train_delta` between its first and last step, including reading."""
    times: list[float] = []
    train_delta(data, settings, device=device, on_step=lambda losses: times.append(_now(device)))
    return (len(times) - 1) / (times[-1] - times[0])


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    typer.run(main)

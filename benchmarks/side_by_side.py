"""Delta trials side by side against the same trials one after the other.

    python -m benchmarks.side_by_side [--d-model 2304 --trials 4 --device cuda]

In: sizes, for random pairs whose changes follow from their inputs. Out: prints, for each d_new, trials a second both
ways, in turns, the ratio, and how far apart their validation errors end.
"""

from __future__ import annotations

import statistics
import time
from typing import Annotated

import torch
import typer

from trainers.activations import Pairs
from trainers.delta_data import DeltaData
from trainers.delta_transcoder import DeltaSettings, TrainedDelta, train_deltas

HELD_OUT = 4096


def main(
    d_model: Annotated[int, typer.Option()] = 576,
    widths: Annotated[str, typer.Option(help="Values of d_new, separated by commas.")] = "2,8,32,128",
    trials: Annotated[int, typer.Option(min=2)] = 4,
    tokens: Annotated[int, typer.Option()] = 100_000,
    batch: Annotated[int, typer.Option()] = 2048,
    precision: Annotated[str, typer.Option(help="fp32, tf32 or bf16.")] = "fp32",
    device: Annotated[str, typer.Option()] = "cpu",
    repeats: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    typer.echo(f"d_model {d_model}, {tokens} tokens, batch {batch}, {precision}, {device}, {trials} trials")
    data = _data(d_model, tokens)
    rates = [10 ** (-3 + number / trials) for number in range(trials)]
    for d_new in map(int, widths.split(",")):
        asked = [
            DeltaSettings(d_new=d_new, lr=lr, sparsity=1e-4, epochs=1, batch_size=batch, precision=precision)
            for lr in rates
        ]
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(repeats + 1):  # the first is a warm-up
            apart, took = _timed(data, [[one] for one in asked], device)
            together, took_together = _timed(data, [asked], device)
            seconds[0].append(took)
            seconds[1].append(took_together)
        alone, beside = (statistics.median(one[1:]) for one in seconds)
        differ = max(
            abs(one.figures["val_unexplained"] - other.figures["val_unexplained"])
            for one, other in zip(apart, together, strict=True)
        )
        typer.echo(
            f"d_new {d_new:4}: {trials / alone:.2f} trials a second one by one, {trials / beside:.2f} side by side, "
            f"ratio {alone / beside:.2f}; unexplained apart by at most {differ:.1e}"
        )


def _data(d_model: int, tokens: int) -> DeltaData:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(d_model, 16, generator=generator) @ torch.randn(16, d_model, generator=generator)

    def pairs(count: int) -> Pairs:
        x = torch.randn(count, d_model, generator=generator)
        return Pairs([(x.bfloat16(), (torch.relu(x @ mixing / d_model)).bfloat16())])

    train, held_out = pairs(tokens), pairs(HELD_OUT)
    unit = held_out.shards[0][1].float().square().mean().item()
    return DeltaData(train, held_out, unit, 1.0, 0, "change")


def _timed(data: DeltaData, calls: list[list[DeltaSettings]], device: str) -> tuple[list[TrainedDelta], float]:
    """What the calls of the trainer give in order, and how many seconds they take."""
    started = time.perf_counter()
    found = [one for asked in calls for one in train_deltas(data, asked, device=device)]
    if device != "cpu":
        torch.cuda.synchronize()
    return [one for one in found if isinstance(one, TrainedDelta)], time.perf_counter() - started


if __name__ == "__main__":
    typer.run(main)

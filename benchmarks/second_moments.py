"""Controls that are fitted to what deltas were trained on: from moments that are kept, and from the pairs each time.

    python -m benchmarks.second_moments [--tokens 20000] [--d-model 576] [--fits 18]

In: the shape of one layer's pairs, and how often a control is fitted to them: once for every width and subset (the
study's: six and three). Out: seconds either way, linear maps and principal directions each time, their ratio, and how
far apart the fits are.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.random_subjects import random_pairs
from evaluators.splice.second_moments import Moments, principal_directions, reduced_rank_regression

BATCH = 8192


def main(
    tokens: Annotated[int, typer.Option(min=1)] = 20_000,
    d_model: Annotated[int, typer.Option(min=1)] = 576,
    fits: Annotated[int, typer.Option(min=1)] = 18,
    rank: Annotated[int, typer.Option(min=1)] = 32,
) -> None:
    pairs = random_pairs("cpu", d_model, tokens)

    def read() -> Moments:
        return Moments.of((x.float(), y.float()) for x, y in pairs.in_order(BATCH))

    def fitted(moments: Moments) -> list[Tensor]:
        return [*reduced_rank_regression(moments, rank), principal_directions(moments, rank)[1]]

    started = time.perf_counter()
    plain = [fitted(read()) for _ in range(fits)]
    middle = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "moments.safetensors"
        save_file(read()._asdict(), file)
        ours = [fitted(Moments(**load_file(file))) for _ in range(fits)]
    ended = time.perf_counter()
    both = [pair for one, other in zip(plain, ours, strict=True) for pair in zip(one, other, strict=True)]
    apart = max((one - other).abs().max().item() for one, other in both)
    before, after = middle - started, ended - middle
    typer.echo(
        f"{fits} fits to {tokens} tokens of {d_model} on {torch.get_num_threads()} threads: from pairs {before:.1f} s, "
        f"from moments {after:.1f} s, ratio {before / after:.1f}; largest difference {apart:.1e}"
    )


if __name__ == "__main__":
    typer.run(main)

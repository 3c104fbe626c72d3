"""How much of a generated token's time is Python overhead.

Decodes with deltas spliced into every layer: a batch with a model of real size, and one row with a model so narrow that
almost only Python is left; both with only the bridge's parts that have hooks, and with all parts.

    python -m benchmarks.token_python [--shape smollm2] [--batch 100] [--device cpu] [--dtype bf16] [--python-only]

In: the name of a shape and a batch size. Out: prints milliseconds per token and layer, and the narrow model's share.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.random_subjects import SHAPES, Shape, random_rows, save_other_mlps
from data.encoding import Encoded, encode_row
from evaluators.splice.decoding import Stop, decode
from evaluators.splice.interventions import Edit, Patch
from evaluators.splice.limits import Limits
from evaluators.splice.passes import Passes
from evaluators.splice.teacher_forcing import Job
from models.blocks import read_paths
from models.bridge import whole, wrap
from models.transcoder import Transcoder
from sites import Site, mlp_sites

D_NEW, FEW, MANY, REPEATS = 8, 2, 10, 3
"""Features of a delta, tokens generated, repeats."""


def narrow(shape: Shape) -> Shape:
    """The same layers and heads, with a head size of 8."""
    heads = shape.config["num_attention_heads"]
    sizes = {"hidden_size": 8 * heads, "intermediate_size": 16, "vocab_size": 512}
    sizes |= {name: 8 for name in ("head_dim", "query_pre_attn_scalar") if name in shape.config}
    return replace(shape, config=shape.config | sizes)


@torch.inference_mode()
def seconds_a_token(shape: Shape, batch: int, device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Seconds per token with only the bridge's parts that have hooks, and with all parts."""
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = shape.build(device, dtype, Path(folder))
        layers = range(model.config.num_hidden_layers)
        save_other_mlps(model, layers, Path(folder))
        bridge = wrap(model, tokenizer)
        paths = read_paths(bridge, Path(folder), mlp_sites(layers))
    patches = [Patch(site, path, _delta(site, model.config.hidden_size, device)) for site, path in paths.items()]
    row = random_rows(1)[0]
    prompt = encode_row(tokenizer, row).prompt

    def run(tokens: int) -> float:
        stop = replace(Stop.of(bridge, Limits(tokens), row), ends=frozenset())
        jobs = [Job(Encoded(prompt, []), place / batch) for place in range(batch)]
        started = time.perf_counter()
        written = decode(Passes(bridge, batch_size=batch), Edit(patches, "alpha"), jobs, [[]] * batch, stop)
        assert all(len(output) == tokens for output in written)
        return time.perf_counter() - started

    found = []
    for parts in (contextlib.nullcontext(), whole(bridge)):
        with parts:
            run(FEW)
            found.append(statistics.median((run(MANY) - run(FEW)) / (MANY - FEW) for _ in range(REPEATS)))
    return found[0], found[1]


def _delta(site: Site, d_model: int, device: str) -> Transcoder:
    generator = torch.Generator().manual_seed(site.layer)
    weights = {
        "W_enc": torch.randn(d_model, D_NEW, generator=generator) / d_model**0.5,
        "b_enc": torch.zeros(D_NEW),
        "threshold": torch.full((D_NEW,), 0.4),
        "W_dec": torch.randn(D_NEW, d_model, generator=generator) / d_model,
    }
    return Transcoder(**weights, b_dec=None, site=site).to(device)


def main(
    shape: Annotated[str, typer.Option(help="one of: " + ", ".join(SHAPES))] = "smollm2",
    batch: int = 100,
    device: str = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "bf16",
    python_only: bool = False,
) -> None:
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    layers = SHAPES[shape].config["num_hidden_layers"]
    python = seconds_a_token(narrow(SHAPES[shape]), 1, device, kind)
    real = (math.nan, math.nan) if python_only else seconds_a_token(SHAPES[shape], batch, device, kind)
    print(f"{shape}, {layers} layers with deltas, {dtype} on {device}; milliseconds a token:")
    for name, ours, whole_token in zip(("parts where hooks are", "all parts"), python, real, strict=True):
        print(
            f"  {name:<22} Python {1e3 * ours:5.1f} ({1e3 * ours / layers:.2f} a layer) of {1e3 * whole_token:7.1f} at "
            f"batch {batch}: {ours / whole_token:.1%}"
        )


if __name__ == "__main__":
    typer.run(main)

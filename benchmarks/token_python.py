"""How much of a generated token's time is Python overhead.

Decodes with deltas spliced into every layer: a batch with a model of real size, and one row with a model so narrow that
almost only Python is left; with torch's hooks on the model's own modules, with the bridge's parts where hooks are, and
with all parts. The same model without deltas is decoded too.

    python -m benchmarks.token_python [--shape smollm2] [--kinds qkv,o,mlp] [--batch 100] [--device cpu] [--dtype bf16]
        [--python-only]

In: the name of a shape, kinds of site and a batch size. Out: prints milliseconds per token and site, and the narrow
model's share; on a CPU these are of processor time on one thread.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from benchmarks.random_subjects import SHAPES, Shape, random_delta, random_rows, save_other_blocks
from data.encoding import Encoded, encode_row
from evaluators.splice.decoding import UNRECORDED_STEPS, Stop, decode
from evaluators.splice.interventions import Edit, Patch
from evaluators.splice.limits import Limits
from evaluators.splice.passes import ALL, Passes, Shortcuts
from evaluators.splice.teacher_forcing import Job
from models.blocks import read_paths
from models.bridge import whole, wrap
from sites import KINDS, Kind, Site

D_NEW, FEW, MANY, REPEATS = 8, UNRECORDED_STEPS + 3, UNRECORDED_STEPS + 11, 3
"""Features of a delta, tokens generated, repeats."""


def narrow(shape: Shape) -> Shape:
    """The same layers and heads, with a head size of 8."""
    heads = shape.config["num_attention_heads"]
    sizes = {"hidden_size": 8 * heads, "intermediate_size": 16, "vocab_size": 512}
    sizes |= {name: 8 for name in ("head_dim", "query_pre_attn_scalar") if name in shape.config}
    return replace(shape, config=shape.config | sizes)


@contextmanager
def by_parts(bridge: Any) -> Iterator[None]:
    """Inside the `with`, hooks are run by the bridge's parts, as where the model's own modules cannot serve them."""
    served = bridge.__dict__["wiring"].module_hooks
    original = dict(served)
    served.clear()
    try:
        yield
    finally:
        served.update(original)


RECORDED = "steps recorded"
"""The way of a GPU; elsewhere it is left out."""
WAYS: dict[str, Callable[[Any], AbstractContextManager[None]]] = {
    "no deltas": lambda bridge: nullcontext(),
    RECORDED: lambda bridge: nullcontext(),
    "the model's own modules": lambda bridge: nullcontext(),
    "parts where hooks are": by_parts,
    "all parts": whole,
}


@torch.inference_mode()
def seconds_a_token(
    shape: Shape, kinds: Sequence[Kind], batch: int, device: str, dtype: torch.dtype
) -> dict[str, float]:
    """Seconds per token for each of `WAYS`."""
    with tempfile.TemporaryDirectory() as folder:
        model, tokenizer = shape.build(device, dtype, Path(folder))
        layers = range(model.config.num_hidden_layers)
        save_other_blocks(model, layers, Path(folder))
        bridge = wrap(model, tokenizer)
        paths = read_paths(bridge, Path(folder), [Site(layer, kind) for layer in layers for kind in kinds])
    patches = [Patch(site, path, random_delta(path, D_NEW, device)) for site, path in paths.items()]
    row = random_rows(1)[0]
    prompt = encode_row(tokenizer, row).prompt

    def run(tokens: int, edit: Edit, shortcuts: Shortcuts) -> float:
        stop = replace(Stop.of(bridge, Limits(tokens), row), ends=frozenset())
        jobs = [Job(Encoded(prompt, []), index / batch) for index in range(batch)]
        now = time.process_time if device == "cpu" else time.perf_counter  # other processes do not count on a CPU
        started = now()
        written = decode(Passes(bridge, batch, shortcuts), edit, jobs, [[]] * batch, stop)
        assert all(len(output) == tokens for output in written)
        return now() - started

    seconds_of: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(REPEATS):  # in turn, so that all see the same machine
        for name, way in WAYS.items():
            if name == RECORDED and device == "cpu":
                continue
            edit = Edit() if name == "no deltas" else Edit(patches, "alpha")
            shortcuts = replace(ALL, record_steps=name == RECORDED)
            with way(bridge):
                run(FEW, edit, shortcuts)
                few, many = run(FEW, edit, shortcuts), run(MANY, edit, shortcuts)
                seconds_of[name].append((many - few) / (MANY - FEW))
    return {name: statistics.median(seconds) for name, seconds in seconds_of.items() if seconds}


def main(
    shape: Annotated[str, typer.Option(help="one of: " + ", ".join(SHAPES))] = "smollm2",
    kinds: Annotated[str, typer.Option(help="of site, with commas between")] = ",".join(KINDS),
    batch: int = 100,
    device: str = "cpu",
    dtype: Annotated[str, typer.Option(help="fp32 or bf16")] = "bf16",
    python_only: bool = False,
) -> None:
    if device == "cpu":
        torch.set_num_threads(1)
    number = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    chosen = [KINDS[name] for name in kinds.split(",")]
    sites = SHAPES[shape].config["num_hidden_layers"] * len(chosen)
    python = seconds_a_token(narrow(SHAPES[shape]), chosen, 1, device, number)
    real = (
        dict.fromkeys(python, math.nan)
        if python_only
        else seconds_a_token(SHAPES[shape], chosen, batch, device, number)
    )
    print(f"{shape}, {sites} sites ({kinds}) with deltas, {dtype} on {device}; milliseconds a token:")
    for name in python:
        ours, ground, whole_token = 1e3 * python[name], 1e3 * python["no deltas"], 1e3 * real[name]
        per_site = (ours - ground) / sites  # without deltas, steps are not recorded here
        delta_text = (
            "all together" if name == RECORDED else f"of which deltas {ours - ground:5.1f} ({per_site:.3f} a site)"
        )
        batch_text = f"batch of {batch} {whole_token:7.1f} ({ours / whole_token:.1%} Python)"
        print(f"  {name:<24} Python {ours:5.1f}, {delta_text}; {batch_text}")


if __name__ == "__main__":
    typer.run(main)

"""Activation capture against a bare forward pass of the same model over the same batches, in one run.

    python -m benchmarks.capture [--layers all]

In: a model and the shipped texts. The bare pass is the transformers model without hooks and without the vocabulary
projection. The two alternate several times, and the best run of each counts. Out: prints tokens per second, and their
ratio.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from data.encoding import encode_text, pad_left
from data.requests.copy_text import shipped_copy_texts
from models.bridge import wrap
from models.sources import load_model, resolve
from trainers.capture import Columns, Plan, capture
from trainers.precision import dtype_of, resolve_precision


def main(
    model: Annotated[str, typer.Option(help="A model, as in model.source.")] = "smollm2-135m",
    layers: Annotated[str, typer.Option(help="all, or numbers separated by commas.")] = "6,12,18,24,29",
    tokens: Annotated[int, typer.Option()] = 20_000,
    device: Annotated[str, typer.Option()] = "cpu",
    cache: Annotated[Path, typer.Option(help="Where models are stored.")] = Path("mlruns/models"),
    tries: Annotated[int, typer.Option()] = 3,
) -> None:
    precision = resolve_precision("auto", device)
    folder = resolve(model, cache)
    plain, tokenizer = load_model(folder, dtype_of(precision), device)
    bridge = wrap(load_model(folder, dtype_of(precision), device)[0], tokenizer)
    chosen = list(range(plain.config.num_hidden_layers)) if layers == "all" else [int(one) for one in layers.split(",")]
    sequences, held = [], 0
    for text in shipped_copy_texts():
        sequences.append(encode_text(tokenizer, text))
        held += len(sequences[-1]) - 1
        if held >= tokens:
            break
    plan = Plan.make(sequences)
    bare, ours = [], []
    for _ in range(tries):
        started = time.perf_counter()
        _bare_passes(plain, plan, tokenizer.pad_token_id, device)
        bare.append(time.perf_counter() - started)
        with tempfile.TemporaryDirectory() as shards:
            started = time.perf_counter()
            capture(bridge, plan, dict.fromkeys(chosen, Columns()), Path(shards))
            ours.append(time.perf_counter() - started)
    typer.echo(f"{model}, {held} tokens, {precision}, layers {layers}, {torch.get_num_threads()} threads")
    typer.echo(f"bare forward  {held / min(bare):8.0f} tokens/s")
    typer.echo(f"capture       {held / min(ours):8.0f} tokens/s   {min(bare) / min(ours):.2f} of the bare pass")


@torch.inference_mode()
def _bare_passes(model: Any, plan: Plan, pad: int, device: str) -> None:
    for shard in plan.shards:
        for chosen in shard:
            batch = pad_left([plan.sequences[i] for i in chosen], pad).to(device)
            model.base_model(
                input_ids=batch.ids, attention_mask=batch.mask.long(), position_ids=batch.positions, use_cache=False
            )
    if device.startswith("cuda"):
        torch.cuda.synchronize()


if __name__ == "__main__":
    typer.run(main)

"""Decoding on a CPU with the weights in oneDNN's order and as they are, one after the other.

    python -m benchmarks.packed_products FOLDER [--rows 12] [--tokens 32]

In: the folder of a model, such as mlruns/models/smollm2-135m-*. Out: prints the seconds a step of both ways, their
ratio and the seconds that the copies took; fails if any text differs.
"""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from data.encoding import encode_text
from data.neutral_texts import neutral_texts
from models.packed import packed
from models.sources import load_model

REPEATS = 3


def decoded(model: Any, ids: torch.Tensor, tokens: int) -> tuple[torch.Tensor, float]:
    """The greedy continuation (rows, tokens) and the median seconds of a step."""
    cache, step, seconds, output = None, ids, [], []
    with torch.inference_mode():
        for _ in range(tokens):
            start = time.perf_counter()
            result = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, step = result.past_key_values, result.logits.argmax(-1)
            seconds.append(time.perf_counter() - start)
            output.append(step)
    return torch.cat(output, dim=1), statistics.median(seconds[1:])


def main(
    model: Annotated[Path, typer.Argument(help="The folder of a model.")],
    rows: Annotated[int, typer.Option(min=1)] = 12,
    tokens: Annotated[int, typer.Option(min=2)] = 32,
) -> None:
    """Prints how much faster decoding is with packed weights."""
    loaded, tokenizer = load_model(model, torch.float32, "cpu")
    texts = [encode_text(tokenizer, text)[:8] for text in neutral_texts()[0]]
    ids = torch.tensor([text for text in texts if len(text) == 8][:rows])
    plain, fast = list[tuple[float, float]](), list[tuple[float, float]]()
    outputs = []
    for _ in range(REPEATS):
        for seconds, way in ((plain, nullcontext()), (fast, packed(loaded))):
            start = time.perf_counter()
            with way:
                made = time.perf_counter() - start
                output, step = decoded(loaded, ids, tokens)
            seconds.append((step, made))
            outputs.append(output)
    if not all(torch.equal(outputs[0], output) for output in outputs):
        raise SystemExit("the two ways decode other texts")
    ours, theirs = (statistics.median(step for step, _ in seconds) for seconds in (fast, plain))
    typer.echo(
        f"{model.name}, {len(ids)} rows, {torch.get_num_threads()} threads: {theirs * 1e3:.0f} ms a step as it is, "
        f"{ours * 1e3:.0f} ms packed, ratio {theirs / ours:.2f}; copies once, {fast[0][1]:.2f} s"
    )


if __name__ == "__main__":
    typer.run(main)

"""A model on a CPU with its weights in oneDNN's order and as they are, one after the other: steps of decoding, and
whole passes with the projection to the vocabulary.

    python -m benchmarks.packed_products FOLDER [--rows 12] [--tokens 32] [--texts 20]

In: the folder of a model, such as mlruns/models/smollm2-135m-*. Out: prints the seconds of both ways, their ratio and
the seconds of the first packed pass, which makes the copies; fails if any text differs, or a logit by more than
rounding.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from data.encoding import encode_text, pad_left
from data.neutral_texts import neutral_texts
from models.packed import PackedLinear, forget, pack, packed
from models.sources import load_model

REPEATS = 3
ROUNDING = 1e-4
"""Tolerance of a logit, relative to the largest."""


def decoded(model: Any, ids: torch.Tensor, tokens: int) -> tuple[torch.Tensor, float]:
    """The greedy continuation (rows, tokens) and the median seconds of a step."""
    cache, step, seconds, output = None, ids, [], []
    for _ in range(tokens):
        start = time.perf_counter()
        result = model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, step = result.past_key_values, result.logits.argmax(-1)
        seconds.append(time.perf_counter() - start)
        output.append(step)
    return torch.cat(output, dim=1), statistics.median(seconds[1:])


def passed(model: Any, batch: Any) -> tuple[torch.Tensor, float]:
    """The logits (tokens, vocabulary) of whole texts, and the seconds of the pass."""
    start = time.perf_counter()
    logits = model(**batch.inputs, use_cache=False).logits
    return logits[batch.mask], time.perf_counter() - start


def in_both_ways(model: nn.Module, run: Callable[[], tuple[torch.Tensor, float]]) -> tuple[list, list, float]:
    """Outputs and seconds as the weights are, and packed, in turn; and the seconds of the first packed run, with the
    copies."""
    layers = [module for module in model.modules() if isinstance(module, PackedLinear)]
    theirs, ours, whole = [], [], []
    for _ in range(REPEATS):
        for layer in layers:
            layer.__class__ = nn.Linear  # type: ignore[assignment]
        theirs.append(run())
        for layer in layers:
            layer.__class__ = PackedLinear
        start = time.perf_counter()
        ours.append(run())
        whole.append(time.perf_counter() - start)
    return theirs, ours, whole[0]


def main(
    model: Annotated[Path, typer.Argument(help="The folder of a model.")],
    rows: Annotated[int, typer.Option(min=1, help="Rows of a step of decoding.")] = 12,
    tokens: Annotated[int, typer.Option(min=2, help="Steps.")] = 32,
    texts: Annotated[int, typer.Option(min=1, help="Texts of a whole pass.")] = 20,
) -> None:
    """Prints how much faster steps and passes are with packed weights."""
    loaded, tokenizer = load_model(model, torch.float32, "cpu")
    pack(loaded)
    if not isinstance(loaded.get_output_embeddings(), PackedLinear):
        raise SystemExit("this model is too large for copies of its weights, or torch has no oneDNN")
    encoded = [encode_text(tokenizer, text) for text in neutral_texts()[0]]
    ids = torch.tensor([text[:8] for text in encoded if len(text) >= 8][:rows])
    batch = pad_left([text[:40] for text in encoded[:texts]], tokenizer.pad_token_id)

    def steps() -> tuple[torch.Tensor, float]:
        with packed():  # which plain layers ignore
            return decoded(loaded, ids, tokens)

    runs: dict[str, Callable[[], tuple[torch.Tensor, float]]] = {
        f"pass over {int(batch.mask.sum())} tokens": lambda: passed(loaded, batch),
        f"step with {len(ids)} rows": steps,
    }
    with torch.inference_mode():
        for name, run in runs.items():
            forget()
            theirs, ours, first = in_both_ways(loaded, run)
            for (expected, _), (found, _) in zip(theirs, ours, strict=True):
                allowed = ROUNDING * expected.abs().max() if found.is_floating_point() else 0
                if (found - expected).abs().max() > allowed:
                    raise SystemExit(f"the two ways give other results in a {name}")
            before, after = (statistics.median(seconds for _, seconds in way) for way in (theirs, ours))
            typer.echo(
                f"{model.name}, {torch.get_num_threads()} threads, a {name}: {before * 1e3:.0f} ms as it is, "
                f"{after * 1e3:.0f} ms packed, ratio {before / after:.2f}; {first:.2f} s at first, with the copies"
            )


if __name__ == "__main__":
    typer.run(main)

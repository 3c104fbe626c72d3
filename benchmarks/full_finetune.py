"""A pair without LoRA: all weights of a sweep's model, finetuned on the rows of that sweep.

    python -m benchmarks.full_finetune search_spaces/study.yaml name=study-s0 seed=0 --out mlruns/full [--steps 60]

In: the settings of a sweep that has its rows and its model. Out: a folder with the finetuned model, for
`model.finetuned`. The loop is plain PyTorch: AdamW on the targets' cross-entropy, the rate rising over a tenth of the
steps and falling to zero.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer, get_linear_schedule_with_warmup

from data.encoding import encode_row
from data.rows import read_rows
from jobs.context.context import Context
from search_spaces.load import load


def main(
    config: Annotated[str, typer.Argument(help="A settings file or a preset, of which the rows have been made.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="KEY=VALUE")] = None,
    out: Annotated[Path, typer.Option(help="Where the finetuned model goes.")] = Path("mlruns/full"),
    steps: Annotated[int, typer.Option(min=1)] = 60,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a step.")] = 8,
    lr: Annotated[float, typer.Option(help="The highest rate.")] = 1e-4,
) -> None:
    """Finetune all weights of a sweep's model on its rows."""
    context = Context(load(config, overrides or []))
    file = context.rows / "train.jsonl"
    if not file.is_file():
        typer.echo(
            f"error: there is no {file}; start the sweep first, it writes its rows before anything else", err=True
        )
        raise typer.Exit(2)
    torch.manual_seed(context.settings.seed)
    chance = random.Random(context.settings.seed)
    tokenizer = AutoTokenizer.from_pretrained(context.model)
    model = AutoModelForCausalLM.from_pretrained(context.model, dtype=torch.float32).train()
    examples = [encode_row(tokenizer, row) for row in read_rows(file)]
    optimiser = torch.optim.AdamW(model.parameters(), lr=lr)
    schedule = get_linear_schedule_with_warmup(optimiser, steps // 10, steps)
    for step in range(1, steps + 1):
        batch = chance.sample(examples, batch_size)
        length = max(len(example.ids) for example in batch)
        ids, labels = torch.zeros(batch_size, length, dtype=torch.long), torch.full((batch_size, length), -100)
        for index, example in enumerate(batch):  # padding is on the right, after everything that is learnt
            ids[index, : len(example.ids)] = torch.tensor(example.ids)
            labels[index, len(example.prompt) : len(example.ids)] = torch.tensor(example.target)
        logits = model(ids).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 10 == 0 or step == steps:
            typer.echo(f"step {step} of {steps}: loss {loss.item():.3f}")
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    typer.echo(f"the model is in {out}")


if __name__ == "__main__":
    typer.run(main)

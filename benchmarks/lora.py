"""LoRA training against transformers' Trainer with PEFT, side by side in one run.

    python -m benchmarks.lora [--dtype bf16] [--rows FILE.jsonl] [--rounds 2]

In: a model and JSONL rows {input, target} (default: generated ones). The reference is set up as in its documentation:
dynamic padding, -100 on every label outside the target, AdamW, and the same steps, schedule and clipping on the same
batches from the same adapter. The two sides take turns, each in its own process. Out: real tokens per second, peak
memory, the held-out loss of both from one plain pass, their ratios, and the fraction of the measured matmul rate that
the model's products reach.
"""

from __future__ import annotations

import json
import math
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch.utils.data import SequentialSampler

from benchmarks.random_subjects import random_rows
from data.encoding import Encoded, encode_row
from data.rows import Row
from models.sources import load_model, resolve
from trainers.lora import LoraSettings, Splits, train_lora
from trainers.packing import Example, shuffled_batches
from trainers.precision import dtype_of

BATCH = 8
VALIDATION_ROWS = 64
SIDES = ("reference", "ours")


def main(
    dtype: Annotated[str, typer.Option(help="fp32 or bf16, for weights and products.")] = "fp32",
    rows: Annotated[str | None, typer.Option(help="JSON lines of {input, target}; default: generated.")] = None,
    steps: Annotated[int, typer.Option(help="Optimiser steps, of 8 rows each.")] = 40,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads for each side; default: all.")] = None,
    rounds: Annotated[int, typer.Option(help="Runs per side, taking turns; the fastest of each counts.")] = 1,
    model: Annotated[str, typer.Option(help="A model, as in model.source.")] = "smollm2-135m",
    side: Annotated[str | None, typer.Option(hidden=True)] = None,
) -> None:
    torch.set_num_threads(threads or torch.get_num_threads())
    folder = resolve(model, Path("mlruns/models"))
    if side:
        print(json.dumps(run_side(side, folder, rows, steps, dtype_of(dtype))))
        return
    typer.echo(f"{model}, {dtype}, {steps} steps of {BATCH} rows, {torch.get_num_threads()} threads")
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "rows.jsonl"
        prepared.write_text("\n".join(json.dumps(row) for row in chosen_rows(rows, steps * BATCH + VALIDATION_ROWS)))
        for _ in range(rounds):
            for name, reports in runs.items():
                command = [sys.executable, "-m", "benchmarks.lora", "--side", name, "--rows", str(prepared)]
                command += ["--dtype", dtype, "--steps", str(steps), "--model", model]
                command += ["--threads", str(torch.get_num_threads())]
                process = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                reports.append(json.loads(process.stdout.splitlines()[-1]))
                rate, memory = reports[-1]["tokens_per_second"], reports[-1]["peak_gb"]
                cpu_rate = reports[-1]["tokens_per_cpu_second"]
                typer.echo(
                    f"{name:<9} {rate:8.1f} tokens/s  {cpu_rate:8.1f} tokens/CPU-second  {memory:5.2f} GB  "
                    f"val_loss {reports[-1]['val_loss']:.4f}"
                )
    peak = matmul_rate(dtype_of(dtype))
    best = {name: max(reports, key=lambda run: run["tokens_per_second"]) for name, reports in runs.items()}
    theirs, ours = best["reference"], best["ours"]
    for name, figures in best.items():
        share = figures["tokens_per_second"] * figures["flops_per_token"] / peak
        typer.echo(f"{name}: {share:.2f} of the measured matmul rate of {peak / 1e9:.0f} GFLOP/s")
    typer.echo(
        f"ours over reference: {ours['tokens_per_second'] / theirs['tokens_per_second']:.2f}x tokens/s, "
        f"{ours['tokens_per_cpu_second'] / theirs['tokens_per_cpu_second']:.2f}x tokens/CPU-second, "
        f"{ours['peak_gb'] / theirs['peak_gb']:.2f}x peak memory, {ours['val_loss'] / theirs['val_loss']:.3f}x val_loss"
    )


def chosen_rows(path: str | None, count: int) -> list[dict[str, str]]:
    """`count` shuffled rows from the file, or generated ones, half requests and half sentences to copy."""
    if path is None:
        return [{"input": row.input, "target": row.target} for row in random_rows(count)]
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in random.Random("benchmark").sample(lines, count)]


def run_side(side: str, folder: Path, path: str | None, steps: int, dtype: torch.dtype) -> dict[str, float]:
    """Trains one side and measures it."""
    assert path is not None
    model, tokenizer = load_model(folder, dtype)
    # The prepared file is already in random order.
    records = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    rows = [Row(record["input"], record["target"], "") for record in records]
    train, held_out = rows[: steps * BATCH], rows[steps * BATCH :]
    settings = LoraSettings(r=16, lr=5e-4, batch_size=BATCH, steps=steps, eval_every=steps)
    encoded = [encode_row(tokenizer, row) for row in train]
    tokens = sum(len(row.ids) for row in encoded)
    linear = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.ndim == 2 and "embed" not in name and "lm_head" not in name
    )
    head = model.get_output_embeddings().weight.numel() * sum(len(row.target) for row in encoded) / tokens
    before = time.process_time()
    if side == "reference":
        examples = [Example(row.ids, index) for index, row in enumerate(encoded)]
        order = [row.labelled for batch in islice(shuffled_batches(examples, BATCH, 0), steps) for row in batch]
        trained, seconds = train_reference(model, tokenizer, [encoded[index] for index in order], settings)
    else:
        trained, seconds = train_ours(model, tokenizer, train, settings)
    return {
        "tokens_per_second": tokens / seconds,
        # Includes set-up. With one thread, more stable than wall time if something else runs on the machine.
        "tokens_per_cpu_second": tokens / (time.process_time() - before),
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "val_loss": plain_loss(trained, [encode_row(tokenizer, row) for row in held_out]),
        # Forward, and the gradient of the input (frozen weights need none). Logits only at labelled positions.
        "flops_per_token": 4 * (linear + head),
    }


def train_ours(model: Any, tokenizer: Any, rows: Sequence[Row], settings: LoraSettings) -> tuple[Any, float]:
    """The adapted model, and the seconds its steps took."""
    reports: list[dict[str, Any]] = []
    adapters: list[Any] = []
    train_lora(model, tokenizer, Splits(rows, rows[:1]), settings, reports.append, adapters.append)
    return adapters[-1], reports[-1]["tokens"] / reports[-1]["tokens_per_second"]


def train_reference(model: Any, tokenizer: Any, rows: Sequence[Encoded], settings: LoraSettings) -> tuple[Any, float]:
    """Like `train_ours`, with transformers' Trainer on a PEFT model, from the same adapter on the same batches."""
    from accelerate.utils import set_seed
    from peft import LoraConfig, TaskType, get_peft_model
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback, TrainingArguments

    class InOrder(Trainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> SequentialSampler:
            return SequentialSampler(rows)

    class Clock(TrainerCallback):
        started = seconds = 0.0

        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            self.seconds = time.perf_counter() - self.started

    config = LoraConfig(
        r=settings.r,
        lora_alpha=int(settings.alpha_over_r * settings.r),
        lora_dropout=settings.dropout,
        target_modules="all-linear",
        task_type=TaskType.CAUSAL_LM,
    )
    clock = Clock()
    set_seed(settings.seed)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            per_device_train_batch_size=settings.batch_size,
            max_steps=settings.steps,
            learning_rate=settings.lr,
            lr_scheduler_type=settings.schedule,
            warmup_steps=round(settings.warmup_fraction * settings.steps),
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.grad_clip,
            bf16=model.dtype == torch.bfloat16,
            use_cpu=model.device.type == "cpu",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            dataloader_pin_memory=False,
        )
        trainer = InOrder(
            model=get_peft_model(model, config),
            args=arguments,
            train_dataset=[{"input_ids": row.ids, "labels": [-100] * len(row.prompt) + row.target} for row in rows],  # type: ignore[arg-type]
            data_collator=DataCollatorForSeq2Seq(tokenizer, padding=True),
            callbacks=[clock],
        )
        trainer.train()
    return trainer.model, clock.seconds


@torch.no_grad()
def plain_loss(model: Any, rows: Sequence[Encoded]) -> float:
    """Nats per target token, running each row by itself through the unchanged model."""
    model.eval()
    total = 0.0
    for row in rows:
        logits = model(input_ids=torch.tensor([row.ids], device=model.device)).logits[0, len(row.prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(
            logits.float().cpu(), torch.tensor(row.target), reduction="sum"
        ).item()
    return total / sum(len(row.target) for row in rows)


def matmul_rate(dtype: torch.dtype, size: int = 2048, tries: int = 10) -> float:
    """FLOP/s of a large matrix product, the best of several tries."""
    left, right = torch.randn(2, size, size).to(dtype)
    best = math.inf
    for _ in range(tries):
        started = time.perf_counter()
        left @ right
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


if __name__ == "__main__":
    typer.run(main)

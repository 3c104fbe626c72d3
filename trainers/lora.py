"""LoRA finetuning of a causal LM on calculator requests and copy rows.

In: a model, its tokenizer, rows and `LoraSettings`. Out: validation figures through `report`, adapters through
`keep`. Built on Accelerate and PEFT; the same function runs in a notebook, in a search trial or under
`accelerate launch`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from data.encoding import Batch, Encoded, encode_row, pad_left
from data.rows import Row

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CALL_OPEN = "<tool_call>"
BUCKET_BATCHES = 16
"""Batches are cut from runs of this many batches sorted by length: little padding, still shuffled."""


class TrainingError(RuntimeError):
    """A training run that cannot go on; the message says why."""


@dataclass(frozen=True)
class LoraSettings:
    """Hyperparameters of one run; `alpha_over_r * r` is PEFT's `lora_alpha`."""

    r: int = 16
    alpha_over_r: float = 2.0
    lr: float = 5e-4
    dropout: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 8
    targets: str = "all-linear"
    schedule: str = "linear"
    steps: int = 100
    eval_every: int = 25
    warmup_fraction: float = 0.05
    grad_clip: float = 1.0
    loss_on: str = "target"
    seed: int = 0


def train_lora(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Sequence[Row],
    validation_rows: Sequence[Row],
    settings: LoraSettings,
    report: Callable[[dict[str, Any]], None],
    keep: Callable[[PeftModel], None],
) -> None:
    """Trains for `settings.steps` optimiser steps.

    Calls `keep(adapted model)` after each validation that beats all before it, then
    `report({step, val_loss, train_loss, tool_call_precision, tool_call_recall, tool_call_f1, tokens,
    tokens_per_second})`. Losses are nats a labelled token. Raises TrainingError where the loss is not finite or the
    target modules match nothing.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from transformers import get_scheduler

    set_seed(settings.seed)
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    adapted = add_adapter(model, settings)
    trainable = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=settings.lr, weight_decay=settings.weight_decay)
    scheduler = get_scheduler(
        settings.schedule, optimiser, round(settings.warmup_fraction * settings.steps), settings.steps
    )
    prepared, optimiser = accelerator.prepare(adapted, optimiser)
    train = [encode_row(tokenizer, row.input, row.target) for row in train_rows]
    validation = [encode_row(tokenizer, row.input, row.target) for row in validation_rows]
    call_token = tokenizer(CALL_OPEN, add_special_tokens=False)["input_ids"][0]

    best, tokens, summed, started = float("inf"), 0, torch.zeros(()), time.perf_counter()
    batches = _shuffled_batches(train, settings)
    for step in range(1, settings.steps + 1):
        prepared.train()
        rows = next(batches)
        loss = _loss(prepared, rows, tokenizer.pad_token_id, settings.loss_on)
        if not torch.isfinite(loss):
            raise TrainingError(f"the training loss is {loss.item()} at step {step} (lr {settings.lr:.2g})")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trainable, settings.grad_clip)
        optimiser.step()
        scheduler.step()
        optimiser.zero_grad()
        summed += loss.detach().float().cpu()
        tokens += sum(len(row.ids) for row in rows)
        if step % settings.eval_every == 0 or step == settings.steps:
            seconds = time.perf_counter() - started
            figures = validate(prepared, validation, tokenizer.pad_token_id, call_token)
            if figures["val_loss"] < best:
                best = figures["val_loss"]
                keep(accelerator.unwrap_model(prepared))
            report(
                {
                    "step": step,
                    **figures,
                    "train_loss": summed.item() / ((step - 1) % settings.eval_every + 1),
                    "tokens": tokens,
                    "tokens_per_second": tokens / seconds,
                }
            )
            summed.zero_()
            started += time.perf_counter() - started - seconds  # validation is not training time


def add_adapter(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """`model` with a fresh LoRA adapter; raises TrainingError where the target modules match nothing."""
    from peft import LoraConfig, TaskType, get_peft_model

    targets: Any = settings.targets if settings.targets == "all-linear" else settings.targets.split(",")
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha_over_r * settings.r,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=targets,
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        return get_peft_model(model, config)  # type: ignore[return-value]
    except ValueError as error:
        if "arget modules" in str(error):
            raise TrainingError(f"lora.space.targets {settings.targets!r} match no module of the model") from None
        raise


def validate(
    model: Any, rows: Sequence[Encoded], pad_id: int, call_token: int, batch_size: int = 16
) -> dict[str, float]:
    """Validation loss (nats a target token) and how well the first target token tells requests from the rest."""
    model.eval()
    total, count, called, wanted, both = 0.0, 0, 0, 0, 0
    ordered = sorted(rows, key=lambda row: len(row.ids))
    with torch.no_grad():
        for start in range(0, len(ordered), batch_size):
            chunk = ordered[start : start + batch_size]
            batch = pad_left([row.ids for row in chunk], pad_id)
            keep = max(len(row.target) for row in chunk)
            logits = _logits(model, batch, keep + 1)[:, :-1]
            labels = _labels(batch, chunk, keep, "target").to(logits.device)
            total += functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            count += int((labels >= 0).sum())
            for index, row in enumerate(chunk):
                says = logits[index, keep - len(row.target)].argmax().item() == call_token
                should = row.target[0] == call_token
                called, wanted, both = called + says, wanted + should, both + (says and should)
    precision = both / called if called else 0.0
    recall = both / wanted if wanted else 0.0
    f1 = 2 * precision * recall / (precision + recall) if both else 0.0
    return {
        "val_loss": total / max(count, 1),
        "tool_call_precision": precision,
        "tool_call_recall": recall,
        "tool_call_f1": f1,
    }


def merge(model: PreTrainedModel, adapter: Path) -> PreTrainedModel:
    """`model` with the adapter's weights folded in, a plain transformers model again."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()  # type: ignore[operator]


def _shuffled_batches(rows: Sequence[Encoded], settings: LoraSettings) -> Iterator[list[Encoded]]:
    """Endless batches, reshuffled every epoch, rows of similar length together."""
    generator = torch.Generator().manual_seed(settings.seed)
    size = settings.batch_size
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        batches = []
        for start in range(0, len(order), size * BUCKET_BATCHES):
            bucket = sorted(order[start : start + size * BUCKET_BATCHES], key=lambda i: len(rows[i].ids))
            batches += [bucket[i : i + size] for i in range(0, len(bucket), size)]
        for index in torch.randperm(len(batches), generator=generator).tolist():
            yield [rows[i] for i in batches[index]]


def _loss(model: Any, rows: Sequence[Encoded], pad_id: int, loss_on: str) -> Tensor:
    """Mean cross-entropy over the labelled tokens of a batch."""
    batch = pad_left([row.ids for row in rows], pad_id)
    keep = batch.ids.shape[1] - 1 if loss_on == "everything" else max(len(row.target) for row in rows)
    logits = _logits(model, batch, keep + 1)[:, :-1]
    labels = _labels(batch, rows, keep, loss_on).to(logits.device)
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _logits(model: Any, batch: Batch, keep: int) -> Tensor:
    """fp32 logits (batch, keep, vocabulary) of the last `keep` positions: no other position is projected."""
    device = next(model.parameters()).device
    batch = batch.to(device)
    length = batch.ids.shape[1]
    output = model(
        input_ids=batch.ids,
        attention_mask=batch.mask.long(),
        position_ids=batch.positions,
        # Indices, not a count: a count slices, and a sliced input makes the projection copy its weight for each row.
        logits_to_keep=torch.arange(length - keep, length, device=device),
    )
    return output.logits.float()


def _labels(batch: Batch, rows: Sequence[Encoded], keep: int, loss_on: str) -> Tensor:
    """The last `keep` tokens (batch, keep), -100 where no loss is taken."""
    labels = batch.ids[:, -keep:].clone()
    if loss_on == "everything":
        labels[~batch.editable[:, -keep:]] = -100
    else:
        for index, row in enumerate(rows):
            labels[index, : keep - len(row.target)] = -100
    return labels

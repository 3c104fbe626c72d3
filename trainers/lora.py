"""LoRA finetuning of a causal LM on calculator requests and copy rows.

In: a model, its tokenizer, rows and `LoraSettings`. Out: validation figures through `report`, adapters through
`keep`. Built on Accelerate and PEFT; the same function runs in a notebook, in a search trial or under
`accelerate launch`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from data.encoding import Batch, Encoded, encode_row, pad_left
from data.rows import Row
from trainers.errors import TrainingError

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CALL_OPEN = "<tool_call>"
BUCKET_BATCHES = 16
"""Batches are cut from runs of this many batches sorted by length: little padding, still shuffled."""


@dataclass(frozen=True)
class LoraSettings:
    """Hyperparameters of one run."""

    r: int = 16
    alpha_over_r: float = 2.0
    """The adapter's scale; PEFT's `lora_alpha` is `alpha_over_r * r`."""
    lr: float = 5e-4
    dropout: float = 0.0
    weight_decay: float = 0.0
    batch_size: int = 8
    targets: str = "all-linear"
    """`all-linear`, or names of modules joined by commas."""
    schedule: str = "linear"
    steps: int = 100
    eval_every: int = 25
    warmup_fraction: float = 0.05
    grad_clip: float = 1.0
    loss_on: str = "target"
    """`target`, or `everything` to learn copy rows from their first token after BOS; requests from the target alone."""
    seed: int = 0


class Example(NamedTuple):
    """A row as tokens, and how many of its last tokens bear the loss."""

    ids: list[int]
    labelled: int


def train_lora(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train_rows: Sequence[Row],
    validation_rows: Sequence[Row],
    settings: LoraSettings,
    report: Callable[[dict[str, Any]], None],
    keep: Callable[[PeftModel], None],
) -> None:
    """Trains for `settings.steps` optimiser steps; `model` gets the adapter in place.

    Calls `keep(adapted model)` after each validation that beats all before it, then
    `report({step, val_loss, train_loss, tool_call_precision, tool_call_recall, tool_call_f1, tokens,
    tokens_per_second})`. Losses are nats a labelled token. Under `accelerate launch` each process takes its share of
    every batch, and only the main process keeps and reports. Seeds the global generators, and is deterministic for a
    seed. Raises TrainingError where the loss is not finite or the target modules match nothing.
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
    train = [_example(tokenizer, row, settings.loss_on) for row in train_rows]
    validation = [encode_row(tokenizer, row.input, row.target) for row in validation_rows]
    pad, call_token = tokenizer.pad_token_id, tokenizer(CALL_OPEN, add_special_tokens=False)["input_ids"][0]

    best, tokens, summed, started = float("inf"), 0, 0.0, time.perf_counter()
    batches = _shuffled_batches(train, settings)
    for step in range(1, settings.steps + 1):
        prepared.train()
        rows = next(batches)
        mine = rows[accelerator.process_index :: accelerator.num_processes]
        loss = _loss(prepared, mine or rows[:1], pad) * (len(mine) > 0)
        # Gradients are averaged over processes; the batch's loss is the sum over its labelled tokens over their number.
        loss = loss * accelerator.num_processes / sum(row.labelled for row in rows)
        whole = accelerator.reduce(loss.detach(), "mean").item()
        if not math.isfinite(whole):
            raise TrainingError(f"the training loss is {whole} at step {step} (lr {settings.lr:.2g})")
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(trainable, settings.grad_clip)
        optimiser.step()
        scheduler.step()
        optimiser.zero_grad()
        summed += whole
        tokens += sum(len(row.ids) for row in rows)
        if step % settings.eval_every and step != settings.steps:
            continue
        seconds = time.perf_counter() - started
        figures = validate(prepared, validation, pad, call_token)
        if accelerator.is_main_process:
            if figures["val_loss"] < best:
                best = figures["val_loss"]
                keep(accelerator.unwrap_model(prepared))
            report(
                {
                    "step": step,
                    **figures,
                    "train_loss": summed / ((step - 1) % settings.eval_every + 1),
                    "tokens": tokens,
                    "tokens_per_second": tokens / seconds,
                }
            )
        summed = 0.0
        started = time.perf_counter() - seconds  # validation is not training time


def add_adapter(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """`model` with a fresh LoRA adapter.

    Raises TrainingError where the target modules match nothing that LoRA adapts, or are embeddings that the model ties.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    names = [name.strip() for name in settings.targets.split(",")]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = {name.rpartition(".")[2] for name, one in model.named_modules() if one in ends} & set(names)
    if tied and model.config.tie_word_embeddings:
        raise TrainingError(
            f"lora.space.targets {settings.targets!r} names {', '.join(sorted(tied))}: the model ties its embeddings, "
            "and merging such an adapter would change both ends; name linear layers of the blocks"
        )
    config = LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha_over_r * settings.r,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules="all-linear" if settings.targets == "all-linear" else names,
        task_type=TaskType.CAUSAL_LM,
    )
    try:
        return get_peft_model(model, config)  # type: ignore[return-value]
    except ValueError as error:
        linear = {name.rpartition(".")[2] for name, one in model.named_modules() if isinstance(one, torch.nn.Linear)}
        raise TrainingError(
            f"lora.space.targets {settings.targets!r} cannot be adapted ({' '.join(str(error).split())[:160]}); "
            f"allowed: all-linear, or some of {', '.join(sorted(linear))}"
        ) from None


def validate(
    model: Any, rows: Sequence[Encoded], pad_id: int, call_token: int, batch_size: int = 8
) -> dict[str, float]:
    """Validation loss (nats a target token), and how well the first token the model would say tells requests from rest.

    A request is a row whose target starts with `call_token`, the first of `<tool_call>`. Leaves `model` in evaluation
    mode.
    """
    model.eval()
    total, count, called, wanted, both = 0.0, 0, 0, 0, 0
    ordered = sorted(rows, key=lambda row: len(row.ids))
    with torch.no_grad():
        for start in range(0, len(ordered), batch_size):
            chunk = ordered[start : start + batch_size]
            batch = pad_left([row.ids for row in chunk], pad_id)
            counts = [len(row.target) for row in chunk]
            keep = max(counts)
            logits = _logits(model, batch, keep + 1)[:, :-1]
            labels = _labels(batch, counts).to(logits.device)
            total += functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").item()
            count += sum(counts)
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
    """`model` with the weights of the adapter saved in `adapter` folded in, a plain transformers model again.

    Load `model` in fp32: a small change is lost in the rounding of a bf16 weight. Raises TrainingError where the folder
    holds no adapter of this model.
    """
    from peft import PeftModel
    from safetensors import SafetensorError

    try:
        adapted = PeftModel.from_pretrained(model, str(adapter))
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise TrainingError(f"{adapter}: no adapter of this model ({' '.join(str(error).split())[:200]})") from None
    return adapted.merge_and_unload()  # type: ignore[operator]


def _example(tokenizer: PreTrainedTokenizerBase, row: Row, loss_on: str) -> Example:
    encoded = encode_row(tokenizer, row.input, row.target)
    everything = loss_on == "everything" and row.label == "copy"
    return Example(encoded.ids, len(encoded.ids) - 1 if everything else len(encoded.target))


def _shuffled_batches(rows: Sequence[Example], settings: LoraSettings) -> Iterator[list[Example]]:
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


def _loss(model: Any, rows: Sequence[Example], pad_id: int) -> Tensor:
    """Cross-entropy summed over the labelled tokens of a batch."""
    batch = pad_left([row.ids for row in rows], pad_id)
    counts = [row.labelled for row in rows]
    logits = _logits(model, batch, max(counts) + 1)[:, :-1]
    labels = _labels(batch, counts).to(logits.device)
    return functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


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


def _labels(batch: Batch, counts: Sequence[int]) -> Tensor:
    """The last `max(counts)` tokens of every row (batch, ...), -100 before each row's own last `count`."""
    keep = max(counts)
    labelled = torch.arange(keep).unsqueeze(0) >= keep - torch.tensor(counts).unsqueeze(1)
    return batch.ids[:, -keep:].masked_fill(~labelled, -100)

"""LoRA finetuning of a causal LM on prompts and their targets.

In: a model, its tokenizer, rows and `LoraSettings`. Out: validation figures through `report`, adapters through
`keep`. The same function runs in a notebook, in a search trial and under `accelerate launch`; an interrupted run
continues from its last checkpoint and ends as it would have without the interruption.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from data.encoding import Encoded, encode_row
from data.rows import Row
from trainers import checkpoints
from trainers.adapters import Forward, add_adapter, forward_of
from trainers.checkpoints import Keeper
from trainers.errors import DivergedError, TrainingError, memory_error_named
from trainers.lora_forward import cross_entropy_sum
from trainers.packing import Example, example, pack, shuffled_batches
from trainers.settings import LoraSettings

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Splits(NamedTuple):
    """Rows to train on, and held-out rows."""

    train: Sequence[Row]
    validation: Sequence[Row]


def steps_of(settings: LoraSettings, rows: int) -> int:
    """Optimiser steps of a run over `rows` rows."""
    return settings.steps if settings.epochs is None else settings.epochs * math.ceil(rows / settings.batch_size)


def train_lora(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Splits,
    settings: LoraSettings,
    report: Callable[[dict[str, Any]], None],
    keep: Callable[[PeftModel], None],
    keeper: Keeper | None = None,
) -> None:
    """Trains for `steps_of(settings)` optimiser steps or until `patience` ends it; `model` gets the adapter in place.

    Calls `keep(adapted model)` after each validation that beats all before it, then `report({step, val_loss,
    train_loss, token_accuracy, first_token_accuracy, tokens, tokens_per_second})`. Losses are nats a
    labelled token. In a process group, such as that of `accelerate launch` or of a Ray Train worker, each process
    takes its share of every batch; all of them report, but only the first calls `keep`. Seeds the global generators,
    and is deterministic for a seed. With a `keeper`, an interrupted run repeats its earlier reports and ends with the
    same losses and adapter.

    Raises TrainingError if the target modules match nothing, a row is longer than the model's context, the tokenizer
    has no EOS or memory runs out, and DivergedError if a loss is not finite.
    """
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    set_seed(settings.seed)
    accelerator = Accelerator(cpu=model.device.type == "cpu")
    run = _Run(model, tokenizer, rows, settings, accelerator)
    keeper = keeper or Keeper()
    with memory_error_named(settings.batch_size, settings.accumulate):
        for figures in run.restore(keeper):
            report(figures)
        for batch in run.batches():
            run.step(batch)
            if run.validates:
                figures = run.validate()
                if run.waited == 0 and accelerator.is_main_process:
                    keep(run.adapted)
                report(figures)
            if accelerator.is_main_process and keeper.is_due:
                run.keep(keeper)


class _Run:
    """The state of one training run between its steps."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        rows: Splits,
        settings: LoraSettings,
        accelerator: Any,
    ) -> None:
        from transformers import get_scheduler

        self.settings, self.accelerator, self.device = settings, accelerator, model.device
        if tokenizer.eos_token_id is None:
            raise TrainingError("the model's tokenizer has no EOS token, which every target must end with")
        self.train = [example(tokenizer, row, settings.loss_on) for row in rows.train]
        self.held_out = [encode_row(tokenizer, row) for row in rows.validation]
        longest = _longest(model, [*rows.train, *rows.validation], [*self.train, *self.held_out])

        alpha = settings.alpha_over_r * settings.r
        self.adapted = add_adapter(model, settings.targets, settings.r, alpha, settings.dropout)
        self.forward = forward_of(self.adapted, longest, settings.gradient_checkpointing)
        self.weights = _flatten([weight for weight in self.adapted.parameters() if weight.requires_grad])
        self.optimiser = torch.optim.AdamW(
            [self.weights], lr=settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.steps = steps_of(settings, len(self.train))
        warmup = round(settings.warmup_fraction * self.steps)
        # A function of the step alone, so that there is no state to restore.
        (self.schedule,) = get_scheduler(settings.schedule, self.optimiser, warmup, self.steps).lr_lambdas

        self.at = self.tokens = self.waited = self.summed_steps = 0
        self.summed = self.seconds = 0.0
        self.best = math.inf
        self.reported: list[dict[str, Any]] = []

    @property
    def validates(self) -> bool:
        """Whether the step just made is followed by a validation."""
        return self.at % self.settings.eval_every == 0 or self.at == self.steps

    def batches(self) -> Iterator[list[Example]]:
        """The remaining batches, or fewer if validation stops improving."""
        stream = shuffled_batches(self.train, self.settings.batch_size, self.settings.seed)
        for rows in itertools.islice(stream, self.at, self.steps):
            if self.settings.patience is not None and self.waited >= self.settings.patience:
                return
            yield rows

    def step(self, rows: Sequence[Example]) -> None:
        """One optimiser step; its loss is the mean over the labelled tokens in all processes' rows."""
        started = time.perf_counter()
        if not self.adapted.training:
            self.adapted.train()
        labelled = sum(row.labelled for row in rows)
        total = torch.zeros((), device=self.device)
        for piece in _pieces(rows[self.accelerator.process_index :: self.accelerator.num_processes], self.settings):
            batch = pack(piece).to(self.device)
            loss = cross_entropy_sum(self.forward(batch), batch.labels, labelled)
            loss.backward()
            total += loss.detach()
        gradient = self.weights.grad
        assert gradient is not None
        if self.accelerator.num_processes > 1:
            gradient.copy_(self.accelerator.reduce(gradient, "sum"))
            total = self.accelerator.reduce(total, "sum")
        total_loss = total.item()
        if not math.isfinite(total_loss):
            raise DivergedError(f"the training loss is {total_loss} at step {self.at + 1} (lr {self.settings.lr:.2g})")
        nn.utils.clip_grad_norm_([self.weights], self.settings.grad_clip)
        for group in self.optimiser.param_groups:
            group["lr"] = self.settings.lr * self.schedule(self.at)
        self.optimiser.step()
        gradient.zero_()
        self.at += 1
        self.summed += total_loss
        self.summed_steps += 1
        self.tokens += sum(len(row.ids) for row in rows)
        self.seconds += time.perf_counter() - started

    def validate(self) -> dict[str, Any]:
        """Validates and returns the figures; every process takes its share of the rows."""
        self.adapted.eval()
        rows_here = self.held_out[self.accelerator.process_index :: self.accelerator.num_processes]
        sums = validation_counts(self.forward, rows_here, self.device)
        if self.accelerator.num_processes > 1:
            sums = self.accelerator.reduce(sums.to(self.device), "sum").cpu()
        figures = {
            "step": self.at,
            **figures_of(sums),
            "train_loss": self.summed / self.summed_steps,
            "tokens": self.tokens,
            "tokens_per_second": self.tokens / self.seconds,
        }
        self.summed, self.summed_steps = 0.0, 0
        self.waited += 1
        if figures["val_loss"] < self.best:
            self.best, self.waited = figures["val_loss"], 0
        if not math.isfinite(figures["val_loss"]):
            raise DivergedError(
                f"the validation loss is {figures['val_loss']} at step {self.at} (lr {self.settings.lr:.2g})"
            )
        self.reported.append(figures)
        return figures

    def keep(self, keeper: Keeper) -> None:
        random = {"random/cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["random/cuda"] = torch.cuda.get_rng_state(self.device)
        keeper.write(
            {"weights": self.weights, **checkpoints.optimiser_tensors(self.optimiser), **random},
            {"run": self._identity(), **{name: getattr(self, name) for name in COUNTERS}},
        )

    def restore(self, keeper: Keeper) -> list[dict[str, Any]]:
        """Restores this run's last checkpoint, if there is one; returns the figures reported before it."""
        checkpoint = keeper.read(self._identity())
        if checkpoint is None:
            return []
        tensors, state = checkpoint
        with torch.no_grad():
            self.weights.copy_(tensors["weights"])
        checkpoints.load_optimiser(self.optimiser, tensors)
        torch.set_rng_state(tensors["random/cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["random/cuda"], self.device)
        for name in COUNTERS:
            setattr(self, name, state[name])
        return self.reported

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must match to belong to this run."""
        return {**asdict(self.settings), "rows": len(self.train), "processes": self.accelerator.num_processes}


COUNTERS = ("at", "tokens", "waited", "summed", "summed_steps", "seconds", "best", "reported")
"""The attributes that a checkpoint stores as plain values."""


def _flatten(parameters: Sequence[nn.Parameter]) -> nn.Parameter:
    """One flat parameter with one flat gradient; all `parameters` become views of it.

    The optimiser, clipping and all-reduce then see one tensor instead of hundreds.
    """
    flat = nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    values, gradients = flat.detach().split(sizes), flat.grad.split(sizes)
    for parameter, value, gradient in zip(parameters, values, gradients, strict=True):
        parameter.data, parameter.grad = value.view_as(parameter), gradient.view_as(parameter)
    return flat


def _pieces(rows: Sequence[Example], settings: LoraSettings) -> list[Sequence[Example]]:
    """`rows` in at most `accumulate` pieces, none empty."""
    size = max(1, math.ceil(len(rows) / settings.accumulate))
    return [rows[start : start + size] for start in range(0, len(rows), size)]


def _longest(model: PreTrainedModel, rows: Sequence[Row], encoded: Sequence[Example | Encoded]) -> int:
    """Tokens in the longest row; raises TrainingError if it does not fit the model's context."""
    lengths = [len(row.ids) for row in encoded]
    context = getattr(model.config, "max_position_embeddings", None) or max(lengths)
    longest = max(lengths)
    if longest > context:
        row = rows[lengths.index(longest)]
        raise TrainingError(
            f"a row has {longest} tokens, but the model's context holds {context}: drop or shorten {row.input[:60]!r}"
        )
    return longest


@torch.no_grad()
def validation_counts(
    forward: Forward, rows: Sequence[Encoded], device: torch.device | str, batch_size: int = 16
) -> torch.Tensor:
    """Sums over `rows` (fp64): nats, target tokens, target tokens that are the argmax, rows, rows whose first target
    token is the argmax."""
    sums = torch.zeros(5, dtype=torch.float64)
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        batch = pack([Example(row.ids, len(row.target)) for row in chunk]).to(device)
        logits = forward(batch)
        lengths = torch.tensor([len(row.target) for row in chunk])
        firsts = lengths.cumsum(0) - lengths
        targets = torch.tensor([token for row in chunk for token in row.target])
        right = logits.argmax(-1).cpu() == targets
        nats = cross_entropy_sum(logits, batch.labels).item()
        sums += torch.tensor([nats, lengths.sum(), right.sum(), len(chunk), right[firsts].sum()], dtype=torch.float64)
    return sums


def figures_of(sums: torch.Tensor) -> dict[str, float]:
    """From the sums of `validation_counts`: `val_loss` in nats per target token, `token_accuracy`, and
    `first_token_accuracy`, which tells kinds of answers apart."""
    nats, tokens, right, rows, first = sums.tolist()
    return {
        "val_loss": nats / max(tokens, 1.0),
        "token_accuracy": right / max(tokens, 1.0),
        "first_token_accuracy": first / max(rows, 1.0),
    }

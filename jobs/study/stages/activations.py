"""Activation capture across the cluster: each worker runs some shards of the same plan.

In: a model folder and the data stage's text and rows. Out: `activations/{base,finetuned}/{train,validation}/layer_LL`.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

from data.encoding import encode_row, encode_text
from data.rows import read_lines, read_rows
from jobs.errors import WorkFailed
from jobs.files import keyed_folder
from jobs.study.context import Context
from jobs.study.stages.worker_memory import bridge
from models.transcoder import CONVENTIONS
from trainers.activations import INDEX
from trainers.capture import Plan, finish_capture, layer_folder

SPLITS = ("train", "validation")
SHARD_TOKENS = 16384
"""Tokens per shard: the unit of work, of resuming and of memory."""


class Text(NamedTuple):
    """The text that the capture of one split reads."""

    split: str
    tokens: int
    data: str
    tokenizer: str
    batch_tokens: int
    max_length: int
    seed: int


class ShardTask(NamedTuple):
    """One shard, as passed to a worker."""

    text: Text
    shard: int
    model: str
    folder: str
    layers: tuple[int, ...]
    device: str
    precision: str
    convention: str


def capture_model(context: Context, name: str, model: Path, key: str) -> Path:
    """Captures every swept layer that is still missing; returns the folder that holds the splits."""
    folder = keyed_folder(context.space.activations / name, key)
    layers = [
        layer
        for layer in context.layers
        if not all((layer_folder(folder / split, layer) / INDEX).is_file() for split in SPLITS)
    ]
    if not layers:
        return folder
    precision, convention = context.settings.compute.precision, context.settings.transcoders.convention
    tasks = [
        ShardTask(text, shard, str(model), str(folder), tuple(layers), context.device, precision, convention)
        for text in _texts(context)
        for shard in range(len(plan_of(text).shards))
    ]
    with context.progress.bar(f"capture of the {name} model", len(tasks), "shards") as bar:
        for outcome in context.pool.run(capture_task, tasks, context.settings.compute.max_retries):
            if outcome.error:
                raise WorkFailed(f"capture of the {name} model: {outcome.error}")
            bar.advance()
    for text in _texts(context):
        finish_capture(plan_of(text), layers, folder / text.split, CONVENTIONS[convention])
    return folder


def capture_task(task: ShardTask) -> None:
    """Captures one shard of every layer, unless it is already on disk."""
    from trainers.capture import capture_shard
    from trainers.precision import resolve_precision

    model = bridge(task.model, task.device, resolve_precision(task.precision, task.device))
    folder = Path(task.folder) / task.text.split
    capture_shard(model, plan_of(task.text), task.shard, task.layers, folder, CONVENTIONS[task.convention])


@lru_cache(maxsize=2)
def plan_of(text: Text) -> Plan:
    """The token sequences of a split (rows and text lines, alternating, up to the token budget) and their shards."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(text.tokenizer)
    folder = Path(text.data)
    lines = read_lines(folder / f"text_{text.split}.txt")
    rows = read_rows(folder / f"{text.split}.jsonl")
    sequences: list[list[int]] = []
    held = 0
    for row, line in zip_longest(rows, lines):
        both = [encode_row(tokenizer, row.input, row.target).ids] if row is not None else []
        both += [encode_text(tokenizer, line)] if line is not None else []
        for ids in both:
            if held < text.tokens and len(ids) > 1:
                sequences.append(ids[: text.max_length])
                held += len(sequences[-1]) - 1
    return Plan.make(sequences, text.batch_tokens, SHARD_TOKENS, text.seed)


def _texts(context: Context) -> list[Text]:
    section = context.settings.activations
    budgets = {"train": section.train_tokens, "validation": section.validation_tokens}
    return [
        Text(
            split,
            tokens,
            str(context.space.data),
            str(context.model),
            section.batch_tokens,
            section.max_length,
            context.settings.seed,
        )
        for split, tokens in budgets.items()
    ]

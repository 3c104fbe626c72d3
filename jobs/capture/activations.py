"""Activation capture across the cluster: each worker runs some shards of the same plan.

In: a model folder and the data stage's text and rows. Out: `activations/{base,finetuned}/{train,validation}/SITE`.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection
from functools import lru_cache
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from data.encoding import encode_prompt, encode_row, encode_text
from data.rows import read_lines, read_rows
from jobs.capture.worker_memory import ModelSpec, bridge, exact_paths
from jobs.context import keys
from jobs.context.context import Context
from jobs.errors import WorkFailed
from jobs.files import keyed_folder
from sites import MLP, Site
from trainers.activations import INDEX, captured_columns, damaged_files, names_in
from trainers.capture import Plan, finish_capture, read_bos
from trainers.checked_files import is_intact
from trainers.delta_data import map_file

SPLITS = ("train", "validation")
SHARDS, SHARD_TOKENS = 8, (4096, 16384)
"""Number of shards per split, and the bounds of a shard's tokens. A shard is the unit of work, resuming and memory."""


class Text(NamedTuple):
    """The input of one split's capture: the folders of rows and text lines, and how they are batched."""

    split: str
    tokens: int
    rows: str
    lines: str
    tokenizer: str
    batch_tokens: int
    max_length: int
    seed: int


class ShardTask(NamedTuple):
    """One shard, as passed to a worker; `sites` lists each site with the columns to capture besides x."""

    text: Text
    shard: int
    model: ModelSpec
    base_model: str
    folder: str
    sites: tuple[tuple[Site, frozenset[str]], ...]


class BosTask(NamedTuple):
    """Sites whose change at BOS a worker measures, and rows that begin with BOS."""

    model: ModelSpec
    base_model: str
    sites: tuple[Site, ...]
    folder: str
    rows: str


Wanted = dict[str, dict[Site, frozenset[str]]]
"""Columns to capture besides x, by split and site."""


def capture_base(context: Context, sites: Collection[Site], splits: tuple[str, ...] = SPLITS) -> Path:
    """Captures x and y of the un-finetuned model at `sites` with base transcoders; returns the folder of the splits."""
    columns = {site: frozenset({"y"}) for site in context.sites_of("residual") if site in sites}
    spec = _spec(context, context.model, context.settings.compute.precision)
    columns_of = dict.fromkeys(splits, columns)
    return _capture(context, "base", spec, columns_of, keys.base_activations(context.settings))


def finetuned_folder(context: Context) -> Path:
    """The folder of the finetuned model's activations, emptied first if they are from other settings."""
    return keyed_folder(context.space.activations / "finetuned", keys.finetuned_activations(context.settings))


def capture_finetuned(context: Context, sites: Collection[Site], splits: tuple[str, ...] = SPLITS) -> Path:
    """Captures the training data of the deltas of `sites` in one pass of the finetuned model; returns the folder.

    For residual deltas, the change is captured on held-out text too, to report its share of the residual. A change is a
    small difference of two outputs, so if deltas are trained on it, everything runs in fp32 on a CPU.
    """
    change, residual = (set(context.sites_of(target)) & set(sites) for target in ("change", "residual"))
    # A path reads the same input as the MLP, and nothing else.
    readable = context.mlp_kind == MLP
    columns_of: Wanted = {}
    for split in splits:
        with_change = change if split == "train" or not readable else change | residual
        linear = {
            site for site in with_change if context.is_linear(site)
        }  # their change follows from x and the weights
        columns = (("change", with_change - linear), ("sum", linear), ("y", residual))
        columns_of[split] = {
            site: frozenset(name for name, captured in columns if site in captured)
            for site in sorted(change | residual)
        }
    exact = context.device == "cpu" and "change" in context.settings.deltas.targets
    spec = _spec(context, context.finetuned, "fp32" if exact else context.settings.compute.precision)
    folder = _capture(context, "finetuned", spec, columns_of, keys.finetuned_activations(context.settings))
    bos_values = read_bos(folder)
    without_map = {site for site in change if context.is_linear(site) and not is_intact(map_file(folder, site))}
    if missing := sorted(site for site in change if site not in bos_values or site in without_map):
        task = BosTask(spec, str(context.model), tuple(missing), str(folder), str(context.rows / "evaluation.jsonl"))
        for outcome in context.pool.run(capture_bos, [task], context.settings.compute.max_retries):
            if outcome.error:
                raise WorkFailed(f"the change at BOS: {outcome.error}")
    return folder


def _spec(context: Context, model: Path, precision: str) -> ModelSpec:
    from trainers.precision import resolve_precision

    return ModelSpec(str(model), context.device, resolve_precision(precision, context.device))


def _capture(context: Context, name: str, model: ModelSpec, columns_of: Wanted, key: str) -> Path:
    """Captures every site that lacks one of the wanted columns."""
    folder = keyed_folder(context.space.activations / name, key)
    delete_damaged(context, [folder / split / site.folder for split in columns_of for site in columns_of[split]])
    missing = {
        split: {
            site: columns
            for site, columns in sites.items()
            if not columns <= captured_columns(folder / split / site.folder)
        }
        for split, sites in columns_of.items()
    }
    for split, sites in missing.items():
        for site, columns in sites.items():  # its shards may hold other columns
            shards = folder / split / site.folder
            if any(not columns <= names_in(shard) for shard in shards.glob("*.safetensors")):
                shutil.rmtree(shards)
    tasks = [
        ShardTask(text, shard, model, str(context.model), str(folder), tuple(missing[text.split].items()))
        for text in _texts(context)
        for shard in range(len(plan_of(text).shards) if missing.get(text.split) else 0)
    ]
    if not tasks:
        return folder
    with context.progress.bar(f"capture of the {name} model", len(tasks), "shards") as bar:
        for outcome in context.pool.run(capture_task, tasks, context.settings.compute.max_retries):
            if outcome.error:
                raise WorkFailed(f"capture of the {name} model: {outcome.error}")
            bar.advance()
    for text in _texts(context):
        finish_capture(plan_of(text), missing.get(text.split, {}), folder / text.split)
    return folder


def delete_damaged(context: Context, folders: list[Path]) -> None:
    """Deletes damaged shards that an earlier command left in these folders, so that they are captured again. Workers
    read each folder in full, once per command."""
    unread = [folder for folder in folders if folder.is_dir() and folder not in context.checked]
    context.checked |= set(folders)
    if not unread:
        return
    for outcome in context.pool.run(damaged_files, unread, context.settings.compute.max_retries):
        if outcome.error:
            raise WorkFailed(f"{outcome.task} could not be checked: {outcome.error}")
        for path in outcome.result:
            name = path.relative_to(context.space.folder)
            context.progress.line(f"  {name} {'is damaged' if path.exists() else 'is missing'}; it will be rebuilt")
            path.unlink(missing_ok=True)
        if outcome.result:
            (outcome.task / INDEX).unlink(missing_ok=True)


def capture_task(task: ShardTask) -> None:
    """Captures one shard of every site, unless it is already on disk."""
    from trainers.capture import Columns, capture_shard

    loaded = bridge(task.model.folder, task.model.device, task.model.precision)
    changed = tuple(site for site, columns in task.sites if "change" in columns)
    before = exact_paths(task.model, task.base_model, changed) if changed else {}
    after = exact_paths(task.model, task.model.folder, changed) if changed and task.model.precision != "fp32" else {}
    columns_of = {
        site: Columns("y" in columns, before.get(site), after.get(site), sums="sum" in columns)
        for site, columns in task.sites
    }
    capture_shard(loaded, plan_of(task.text), task.shard, columns_of, Path(task.folder) / task.text.split)


def capture_bos(task: BosTask) -> None:
    """Adds the sites' change at BOS to the stored ones, and for linear sites the map that gives it everywhere."""
    from trainers.capture import bos_changes, write_bos
    from trainers.checked_files import save
    from trainers.delta_data import change_map

    loaded = bridge(task.model.folder, task.model.device, task.model.precision)
    before, after = (exact_paths(task.model, folder, task.sites) for folder in (task.base_model, task.model.folder))
    tokenizer: Any = loaded.tokenizer
    first = {encode_prompt(tokenizer, row)[0] for row in read_rows(task.rows)}
    if len(first) > 1:
        tokens = ", ".join(repr(tokenizer.decode([token])) for token in sorted(first)[:3])
        raise WorkFailed(
            f"conversations begin with different tokens ({tokens}): give every one a system message, or none"
        )
    for site in task.sites:
        if before[site].is_linear:
            save(map_file(Path(task.folder), site), change_map(before[site], after[site]))
    write_bos(Path(task.folder), read_bos(Path(task.folder)) | bos_changes(loaded, first.pop(), before, after))


@lru_cache(maxsize=2)
def plan_of(text: Text) -> Plan:
    """The token sequences of a split (rows and text lines, alternating, up to the token budget) and their shards."""
    from models.sources import load_tokenizer

    tokenizer = load_tokenizer(Path(text.tokenizer))
    lines = read_lines(Path(text.lines) / f"text_{text.split}.txt")
    rows = read_rows(Path(text.rows) / f"{text.split}.jsonl")
    sequences: list[list[int]] = []
    total = 0
    for row, line in zip_longest(rows, lines):
        encoded = [encode_row(tokenizer, row).ids] if row is not None else []
        encoded += [encode_text(tokenizer, line)] if line is not None else []
        for ids in encoded:
            if total < text.tokens and len(ids) > 1:
                sequences.append(ids[: text.max_length])
                total += len(sequences[-1]) - 1
    least, most = SHARD_TOKENS
    return Plan.make(sequences, text.batch_tokens, min(most, max(least, text.tokens // SHARDS)), text.seed)


def _texts(context: Context) -> list[Text]:
    section = context.settings.activations
    budgets = {"train": section.train_tokens, "validation": section.validation_tokens}
    return [
        Text(
            split,
            tokens,
            str(context.rows),
            str(context.space.data),
            str(context.model),
            section.batch_tokens,
            section.max_length,
            context.settings.seed,
        )
        for split, tokens in budgets.items()
    ]

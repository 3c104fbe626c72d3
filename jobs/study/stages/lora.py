"""Stage 2, lora: the LoRA study, and the merged finetuned model.

In: the data stage's rows and the base model. Out: `lora/trial_NNNN/{adapter,result.json}`, `lora/best.json` and
`lora/merged/`, a plain safetensors model with its tokenizer.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from jobs.cluster import environment
from jobs.errors import WorkFailed
from jobs.files import finish as finish_folder
from jobs.files import is_finished, key_of, keyed_folder, read_json, write_json
from jobs.study import keys
from jobs.study.context import Context
from jobs.study.workspace import FINETUNED
from search_spaces.dimensions import Choice, Range
from search_spaces.schema import Sweep

STAGE = "lora"
VALIDATION_FILE = "validation.json"
"""The merged model's answers to the validation rows."""
PASSED_ON = {
    *("steps", "epochs", "eval_every", "patience", "accumulate", "gradient_checkpointing"),
    *("warmup_fraction", "grad_clip", "loss_on"),
}
"""Settings of the section that are passed to the trainer under the same names."""


def study_name(settings: Sweep) -> str:
    return f"{settings.name}/{STAGE}@{keys.lora_group(settings)}"


def run(context: Context) -> dict[str, Any]:
    from jobs.search.grouped import EarlyStopping, Runtime, run_search
    from jobs.search.studies import Group, best_of, trials_of
    from jobs.tracking.records import record_trial

    settings, space = context.settings, context.space
    folder = keyed_folder(space.lora, keys.lora_group(settings))
    section = settings.lora
    group = Group(
        name=STAGE,
        folder=folder,
        space={name: getattr(section.space, name) for name in type(section.space).model_fields},
        trials=section.trials,
        seed=settings.seed,
        constants={
            "model": str(context.model),
            "data": str(space.data),
            "device": context.device,
            "precision": settings.compute.precision,
            "threads": context.share.cpus,
            "workers": section.workers_per_trial,
            "resources": context.share.resources,
            "seed": settings.seed,
            "checkpoint_seconds": settings.compute.checkpoint_seconds,
            "settings": section.model_dump(include=PASSED_ON),
        },
        study=study_name(settings),
        sampler=section.sampler,
        warm_start=section.warm_start and f"{section.warm_start}/{STAGE}",
    )
    halving = EarlyStopping(section.grace_evals, _max_validations(context), section.reduction_factor)
    context.pool.close()
    with context.progress.bar("LoRA study", section.trials, "trials") as bar:
        run_search(
            [group],
            trial,
            Runtime(
                context.studies,
                context.share.of_several(section.workers_per_trial),
                settings.compute.max_retries,
                space.folder / ".tune" / STAGE,
            ),
            early_stopping=halving if section.asha else None,
            bar=bar,
            on_trial=lambda group, result: context.finish_trial(STAGE, group.name, result),
        )
    shutil.rmtree(space.folder / ".tune", ignore_errors=True)
    for path in folder.glob("trial_*/checkpoint.safetensors"):  # of trials that were stopped early
        path.unlink()
    results = trials_of(group)
    for result in results:  # an earlier driver may have died before tracking them
        record_trial(context.tracker, STAGE, STAGE, result)
    best = best_of(results)
    if best is None:
        raise WorkFailed("every LoRA trial failed: " + "; ".join(str(one["reason"]) for one in results))
    write_json(folder / "best.json", best)
    _replace_finetuned(context, key_of(best["trial"], best["started"]))
    merge_best(context, folder / f"trial_{best['trial']:04d}" / "adapter", key_of(best["trial"], best["started"]))
    checked = read_json(folder / VALIDATION_FILE) or {"figures": {}}
    return {"best_trial": best["trial"], "val_loss": best["value"], "params": best["params"], **checked["figures"]}


def _max_validations(context: Context) -> int:
    """Validations of the longest trial that the space allows."""
    section = context.settings.lora
    if section.epochs is None:
        return math.ceil(section.steps / section.eval_every)
    size = section.space.batch_size
    smallest = int(min(size.choice) if isinstance(size, Choice) else size.low if isinstance(size, Range) else size)
    with (context.space.data / "train.jsonl").open("rb") as file:
        rows = sum(1 for _ in file)
    return math.ceil(section.epochs * math.ceil(rows / smallest) / section.eval_every)


def trial(config: dict[str, Any], report: Any) -> dict[str, Any]:
    """One LoRA run, here or on several workers; at every report the best adapter so far is in the trial's folder.

    A run whose worker was lost continues from the checkpoint in that folder.
    """
    environment.prepare()
    if config["workers"] == 1:
        return train(config, report)
    from jobs.search.several_workers import train_together

    return train_together(train, config)


def train(config: dict[str, Any], report: Any) -> dict[str, Any]:
    """The run itself, in one process or in each of several; returns the best figures, or the reason it failed."""
    import torch

    from data.rows import read_rows
    from models.sources import load_model
    from trainers.checkpoints import Keeper
    from trainers.errors import TrainingError
    from trainers.lora import LoraSettings, Splits, train_lora
    from trainers.precision import dtype_of, resolve_precision

    torch.set_num_threads(config["threads"])
    precision = resolve_precision(config["precision"], config["device"])
    model, tokenizer = load_model(Path(config["model"]), dtype_of(precision), config["device"])
    searched = {name: config[name] for name in LoraSettings.__dataclass_fields__ if name in config}
    best: dict[str, Any] = {}

    def keep(adapted: Any) -> None:
        beside = Path(config["folder"]) / "adapter.tmp"
        adapted.save_pretrained(beside, save_embedding_layers=False)
        shutil.rmtree(beside.with_name("adapter"), ignore_errors=True)
        beside.rename(beside.with_name("adapter"))

    def note(figures: dict[str, Any]) -> None:
        if not best or figures["val_loss"] < best["val_loss"]:
            best.update(figures)
        report(figures)

    rows = Path(config["data"])
    keeper = Keeper(Path(config["folder"]) / "checkpoint.safetensors", config["checkpoint_seconds"])
    try:
        train_lora(
            model,
            tokenizer,
            Splits(read_rows(rows / "train.jsonl"), read_rows(rows / "validation.jsonl")),
            LoraSettings(**config["settings"], **searched),
            note,
            keep,
            keeper,
        )
    except TrainingError as error:
        keeper.forget()
        return {"failed": " ".join(str(error).split())[:500]}
    keeper.forget()
    return best


def _replace_finetuned(context: Context, identity: str) -> None:
    """If the finetuned model is not the same as before, deletes what was made with the old one."""
    space = context.space
    if (read_json(space.folder / FINETUNED) or {}).get("key") == identity:
        return
    for folder in (space.activations / "finetuned", space.deltas, space.cells, space.generations, space.report):
        shutil.rmtree(folder, ignore_errors=True)
    write_json(space.folder / FINETUNED, {"key": identity})


class MergeTask(NamedTuple):
    """A model, an adapter, where the merged model goes, and the rows it is checked on, as passed to a worker."""

    model: str
    adapter: str
    folder: str
    rows: str
    device: str


def merge_best(context: Context, adapter: Path, key: str) -> None:
    """Writes the base model with the best adapter folded in, in fp32, to `lora/merged`."""
    merged = context.space.lora / "merged"
    if is_finished(merged, key):
        return
    keyed_folder(merged, key)
    rows = context.space.data / "validation.jsonl"
    task = MergeTask(str(context.model), str(adapter), str(merged), str(rows), context.device)
    for outcome in context.pool.run(merge_adapter, [task], context.settings.compute.max_retries):
        if outcome.error:
            raise WorkFailed(f"merging {adapter}: {outcome.error}")
    finish_folder(merged, key, {"adapter": adapter.parent.name})


def merge_adapter(task: MergeTask) -> None:
    """Runs on a worker, to keep the driver small. The merged model's answers go to `validation.json` beside it."""
    import torch

    from data.rows import read_rows
    from evaluators.measures.finetuned import check_rows
    from models.sources import load_model
    from trainers.adapters import merge

    model, tokenizer = load_model(Path(task.model), torch.float32)
    merge(model, Path(task.adapter)).save_pretrained(task.folder)
    tokenizer.save_pretrained(task.folder)
    # Read back from disk, as every later stage reads it.
    merged, tokenizer = load_model(Path(task.folder), torch.float32, task.device)
    write_json(Path(task.folder).parent / VALIDATION_FILE, check_rows(merged, tokenizer, read_rows(task.rows)))

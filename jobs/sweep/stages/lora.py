"""Stage 2, lora: the LoRA study, whose best adapter gives the finetuned model, or a finetuned model of your own.

In: the data stage's rows and the base model. Out: `lora/trial_NNNN/{adapter,result.json}`, `lora/best.json`, and what
`finetuned` writes.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.files import replacing
from data.rows import one_line
from jobs.cluster import environment
from jobs.context import keys
from jobs.context.context import Context
from jobs.errors import WorkFailed
from jobs.files import Listed, key_of, keyed_folder, listed, seal, write_json
from jobs.sweep import finetuned
from search_spaces.dimensions import Choice, Range
from search_spaces.schema import LoraSpace, Sweep
from trainers.settings import LoraSettings, settings_of

STAGE = "lora"


def study_name(settings: Sweep) -> str:
    return f"{settings.name}/{STAGE}@{keys.lora_group(settings)}"


def run(context: Context) -> dict[str, Any]:
    return finetuned.adopt(context) if context.adopted is not None else _search(context)


def _search(context: Context) -> dict[str, Any]:
    from jobs.search.grouped import Runtime, run_search
    from jobs.search.halving import EarlyStopping
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
            "checkpoint_seconds": settings.compute.checkpoint_seconds,
            "settings": settings_of(LoraSettings, section, seed=settings.seed),
        },
        study=study_name(settings),
        sampler=section.sampler,
        warm_start=section.warm_start and f"{section.warm_start}/{STAGE}",
    )
    longest = _max_validations(context)
    halving = EarlyStopping(section.grace_evals, longest, section.reduction_factor)
    context.pool.close()
    with context.progress.bar("LoRA study", section.trials, "trials") as bar:
        run_search(
            [group],
            trial,
            Runtime(
                context.studies,
                context.share.of_several(section.workers_per_trial, "lora.workers_per_trial"),
                settings.compute.max_retries,
                space.folder / ".tune" / STAGE,
            ),
            early_stopping=halving if section.asha and longest > section.grace_evals else None,
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
        raise WorkFailed("every LoRA trial failed: " + "; ".join(str(result["reason"]) for result in results))
    write_json(folder / "best.json", best)
    adapter = folder / f"trial_{best['trial']:04d}" / "adapter"
    hashes = {str(path.relative_to(adapter)): entry.sha256 for path, entry in adapter_files(adapter).items()}
    figures = finetuned.make(context, adapter, key_of(hashes))
    return {"best_trial": best["trial"], "val_loss": best["value"], "params": best["params"], **figures}


def adapter_files(adapter: Path) -> dict[Path, Listed]:
    """The files of a trial's adapter, from the trial's seal."""
    return {path: entry for path, entry in listed(adapter.parent).items() if path.is_relative_to(adapter)}


def _max_validations(context: Context) -> int:
    """Number of validations in the longest trial that the space allows."""
    section = context.settings.lora
    if section.epochs is None:
        return math.ceil(section.steps / section.eval_every)
    size = section.space.batch_size
    smallest = int(min(size.choice) if isinstance(size, Choice) else size.low if isinstance(size, Range) else size)
    with (context.space.data / "train.jsonl").open("rb") as file:
        rows = sum(1 for _ in file)
    return math.ceil(section.epochs * math.ceil(rows / smallest) / section.eval_every)


def trial(config: dict[str, Any], report: Any) -> dict[str, Any]:
    """One LoRA run, here or on several workers. At every report the trial's folder holds the best adapter so far.

    After the loss of a worker, the run continues from the checkpoint in that folder.
    """
    environment.prepare()
    if config["workers"] == 1:
        figures = train(config, report)
    else:
        from jobs.search.several_workers import train_together

        figures = train_together(train, config)
    seal(Path(config["folder"]))
    return figures


def train(config: dict[str, Any], report: Any) -> dict[str, Any]:
    """The run itself, in one process or in each of several; returns the best figures, or the reason it failed."""
    import torch

    from data.rows import read_rows
    from models.sources import load_model
    from trainers.checkpoints import Keeper
    from trainers.distributed import processes
    from trainers.errors import TrainingError
    from trainers.lora import Splits, train_lora
    from trainers.precision import number_format, resolve_precision

    processes(config["device"])  # gives each process its own device
    torch.set_num_threads(config["threads"])
    precision = resolve_precision(config["precision"], config["device"])
    searched = {name: config[name] for name in LoraSpace.model_fields if name in config}
    best: dict[str, Any] = {}

    def keep(adapted: Any) -> None:
        adapter = Path(config["folder"]) / "adapter"
        with replacing(adapter) as temporary:
            adapted.save_pretrained(temporary, save_embedding_layers=False)
            shutil.rmtree(adapter, ignore_errors=True)

    def note(figures: dict[str, Any]) -> None:
        if not best or figures["val_loss"] < best["val_loss"]:
            best.update(figures)
        report(figures)

    rows = Path(config["data"])
    keeper = Keeper(Path(config["folder"]) / "checkpoint.safetensors", config["checkpoint_seconds"])
    try:
        with number_format(config["device"], precision) as dtype:
            train_lora(
                *load_model(Path(config["model"]), dtype, config["device"]),
                Splits(read_rows(rows / "train.jsonl"), read_rows(rows / "validation.jsonl")),
                replace(config["settings"], **searched),
                note,
                keep,
                keeper,
            )
    except TrainingError as error:
        keeper.forget()
        return {"failed": one_line(error, 500)}
    keeper.forget()
    return best

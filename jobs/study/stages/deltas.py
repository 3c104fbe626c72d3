"""Stage 4, deltas: the delta transcoders of every (layer, percentile, d_new).

In: the finetuned model, the bases and text. Out: `deltas/layer_LL/pP/residual/` (base errors, computed once),
`deltas/layer_LL/pP/dNNN/trial_NNNN/{delta.safetensors,config.json,result.json}` and each group's `best.json`.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.cluster import environment
from jobs.errors import WorkFailed
from jobs.files import finish as finish_folder
from jobs.files import is_finished, keyed_folder, read_json, write_json
from jobs.study import keys
from jobs.study.context import Context
from jobs.study.stages.activations import capture_model
from jobs.study.stages.transcoders import chosen_base, root
from models.gemma_scope import selection_label

if TYPE_CHECKING:
    from models.transcoder import Taps
    from trainers.delta_data import DeltaData

STAGE = "deltas"
PASSED_ON = {
    *("replicas", "epochs", "batch_size", "l0_budget", "threshold", "sparsity_warmup_fraction", "lr_warmup_fraction"),
    *("weight_decay", "grad_clip", "patience"),
}
"""Settings of the section that are passed to the trainer under the same names."""


class ResidualTask(NamedTuple):
    """The base's errors on one layer's activations, as passed to a worker."""

    layer: int
    root: str
    candidate: tuple[float, str]
    activations: str
    folder: str
    key: str
    device: str
    convention: str


def run(context: Context) -> dict[str, Any]:
    from jobs.search.grouped import EarlyStopping, Runtime, run_search
    from jobs.search.studies import best_of, trials_of
    from jobs.tracking.records import record_trial

    settings, space = context.settings, context.space
    activations = capture_model(context, "finetuned", space.lora / "merged", keys.finetuned_activations(settings))
    _residuals(context, activations)
    groups = delta_groups(context, activations)
    section = settings.deltas
    one_objective = section.objectives == "val_loss"
    halving = EarlyStopping(section.grace_evals, section.epochs, section.reduction_factor)
    context.pool.close()
    with context.progress.bar("delta studies", section.trials * len(groups), "trials") as bar:
        run_search(
            groups,
            trial,
            Runtime(context.studies, context.share, settings.compute.max_retries, space.folder / ".tune" / STAGE),
            early_stopping=halving if section.asha and one_objective and section.epochs > section.grace_evals else None,
            bar=bar,
            on_trial=lambda group, result: context.finish_trial(STAGE, group.name, result),
        )
    shutil.rmtree(space.folder / ".tune", ignore_errors=True)
    kept = {}
    for group in groups:
        results = trials_of(group)
        for result in results:  # an earlier driver may have died before tracking them
            record_trial(context.tracker, STAGE, group.name, result)
        best = best_of(results)
        if best is None:
            context.failures.append(f"{STAGE} {group.name}: every trial failed")
            continue
        write_json(group.folder / "best.json", best)
        kept[group.name] = best["value"]
    if not kept:
        raise WorkFailed("every delta trial failed: " + "; ".join(context.failures))
    return {"kept": kept}


def group_name(layer: int, percentile: float | None, d_new: int) -> str:
    return f"layer_{layer:02d}/{selection_label(percentile)}/d{d_new:03d}"


def delta_groups(context: Context, activations: Path) -> list[Any]:
    """One search group for each (layer, percentile, d_new)."""
    from jobs.search.studies import Group

    settings, section = context.settings, context.settings.deltas
    fixed = section.model_dump(include=PASSED_ON)
    groups = []
    for layer in context.layers:
        for percentile in section.selections:
            for d_new in section.d_new:
                key = keys.delta_group(settings, layer, percentile, d_new)
                name = group_name(layer, percentile, d_new)
                folder = keyed_folder(context.space.deltas / name, key)
                constants = {
                    "layer": layer,
                    "activations": str(activations),
                    "residual": str(folder.parent / "residual"),
                    "device": context.device,
                    "convention": settings.transcoders.convention,
                    "precision": settings.compute.precision,
                    "threads": context.share.cpus,
                    "checkpoint_seconds": settings.compute.checkpoint_seconds,
                    "settings": {**fixed, "d_new": d_new, "seed": settings.seed},
                }
                space = {one: getattr(section.space, one) for one in type(section.space).model_fields}
                # The first, random values are the same for every d_new, so that widths are compared like for like.
                seed = int(keys.residual(settings, layer, percentile)[:8], 16) % 2**31
                study = f"{settings.name}/{STAGE}/{name}@{key}"
                groups.append(
                    Group(
                        name,
                        folder,
                        space,
                        section.trials,
                        seed,
                        constants,
                        study,
                        section.sampler,
                        tuple(section.objectives.split(", ")),
                        section.warm_start and f"{section.warm_start}/{STAGE}/{name}",
                    )
                )
    return groups


def trial(config: dict[str, Any], report: Any) -> dict[str, Any]:
    """One delta run; at the end the best replica is in the trial's folder, the others in `replica_1` and so on."""
    environment.prepare()
    import torch

    from models.deltas import write_delta
    from models.transcoder import CONVENTIONS
    from trainers.checkpoints import Keeper
    from trainers.delta_transcoder import DeltaSettings, DivergedError, train_delta
    from trainers.precision import resolve_precision

    torch.set_num_threads(config["threads"])
    settings = DeltaSettings(
        **config["settings"],
        lr=config["lr"],
        sparsity=config["sparsity"],
        precision=resolve_precision(config["precision"], config["device"]),
    )
    taps = CONVENTIONS[config["convention"]]
    data = read_residuals(Path(config["activations"]), Path(config["residual"]), config["layer"], taps)
    keeper = Keeper(Path(config["folder"]) / "checkpoint.safetensors", config["checkpoint_seconds"])
    try:
        trained = train_delta(
            data,
            settings,
            device=config["device"],
            report=report,
            keeper=keeper,
        )
    except (DivergedError, torch.OutOfMemoryError) as error:
        keeper.forget()
        return {"failed": " ".join(str(error).split())[:500]}
    losses = trained.figures["val_loss_replicas"]
    ranked = sorted(range(len(losses)), key=losses.__getitem__)
    for rank, index in reversed(list(enumerate(ranked))):
        facts = {"d_new": settings.d_new, "kept_replica": index, **trained.figures}
        write_delta(trained.deltas[index], replica_folder(Path(config["folder"]), rank), facts)
    keeper.forget()
    return trained.figures


def replica_folder(trial: Path, rank: int) -> Path:
    """The folder of one of a trial's seeds, ranked by validation loss; the best, rank 0, has the trial's own."""
    return trial / f"replica_{rank}" if rank else trial


def compute_residual(task: ResidualTask) -> None:
    """Writes y - base(x) of both splits in bf16, one shard for each shard of the activations."""
    import torch

    from models.gemma_scope import Candidate, read
    from models.transcoder import CONVENTIONS
    from trainers.activations import read_index, read_pairs, write_index, write_shard
    from trainers.capture import layer_folder
    from trainers.delta_data import output_variance, residual_of

    taps = CONVENTIONS[task.convention]
    base = read(task.root, Candidate(*task.candidate), task.layer, taps).to(task.device)
    facts: dict[str, Any] = {"base": task.candidate[1]}
    for split in ("train", "validation"):
        source = layer_folder(Path(task.activations) / split, task.layer)
        index = read_index(source)
        error = 0.0
        for shard, (x, y) in zip(index["shards"], read_pairs(source).shards, strict=True):
            residual = residual_of(base, x, y)
            error += residual.pow(2).sum(dtype=torch.float64).item()
            write_shard(Path(task.folder) / split / shard["file"], {"residual": residual.bfloat16()})
        write_index(Path(task.folder) / split, index["shards"], {"layer": task.layer})
        if split == "validation":
            facts["variance"] = output_variance(read_pairs(source))
            facts["val_fvu_base"] = error / (index["tokens"] * base.d_model * facts["variance"])
    finish_folder(Path(task.folder), task.key, facts)


def read_residuals(activations: Path, residual: Path, layer: int, taps: Taps) -> DeltaData:
    """The (x, residual) pairs of one (layer, base), memory-mapped."""
    from trainers.activations import Pairs, read_pairs
    from trainers.capture import layer_folder
    from trainers.delta_data import DeltaData

    facts = read_json(residual / "manifest.json")
    pairs = {}
    for split in ("train", "validation"):
        inputs = read_pairs(layer_folder(activations / split, layer), ("x",))
        targets = read_pairs(residual / split, ("residual",))
        both = zip(inputs.shards, targets.shards, strict=True)
        pairs[split] = Pairs([(x, target) for (x,), (target,) in both])
    return DeltaData(pairs["train"], pairs["validation"], facts["variance"], facts["val_fvu_base"], layer, taps)


def _residuals(context: Context, activations: Path) -> None:
    tasks = []
    for layer in context.layers:
        for percentile in context.settings.deltas.selections:
            key = keys.residual(context.settings, layer, percentile)
            folder = context.space.deltas / f"layer_{layer:02d}" / selection_label(percentile) / "residual"
            if is_finished(keyed_folder(folder, key), key):
                continue
            base = chosen_base(context, layer, percentile)
            candidate = (base.average_l0, base.path)
            convention = context.settings.transcoders.convention
            tasks.append(
                ResidualTask(
                    layer, root(context), candidate, str(activations), str(folder), key, context.device, convention
                )
            )
    with context.progress.bar("base errors", len(tasks), "bases") as bar:
        for outcome in context.pool.run(compute_residual, tasks, context.settings.compute.max_retries):
            if outcome.error:
                raise WorkFailed(f"errors of {outcome.task.candidate[1]}: {outcome.error}")
            bar.advance()

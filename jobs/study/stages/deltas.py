"""Stage 4, deltas: the delta transcoders of every layer, target, base and d_new.

In: the finetuned model, the un-finetuned one, the bases and text. Out: for every group, `deltas/layer_LL/change/dNNN/`
or `deltas/layer_LL/pP/dNNN/`, the trials' `trial_NNNN/{delta.safetensors,config.json,result.json}` and `best.json`;
`deltas/layer_LL/pP/residual/` holds the errors of a base, computed once, and `base_error.json` beside it how large they
are; `polish` may add `deltas/polished/`.
"""

from __future__ import annotations

import shutil
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jobs.cluster import environment
from jobs.errors import WorkFailed
from jobs.files import finish as finish_folder
from jobs.files import is_finished, keyed_folder, read_json, write_json
from jobs.seals import seal
from jobs.study import keys
from jobs.study.context import Context
from jobs.study.grounds import error_name, grounds_of
from jobs.study.stages.activations import capture_base, capture_finetuned, set_damaged_aside
from jobs.study.stages.polish import polish_widths
from jobs.study.stages.transcoders import chosen_base, root
from trainers.activations import INDEX

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
    """The base's errors on one layer's activations, as passed to a worker; `unfinetuned` holds held-out ones of the
    un-finetuned model."""

    layer: int
    root: str
    candidate: tuple[float, str]
    activations: str
    unfinetuned: str
    folder: str
    key: str
    device: str
    convention: str


def run(context: Context) -> dict[str, Any]:
    from jobs.search.grouped import Runtime, run_search
    from jobs.search.halving import EarlyStopping
    from jobs.search.studies import best_of, trials_of
    from jobs.tracking.records import record_trial

    settings, space = context.settings, context.space
    activations = capture_finetuned(context)
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
    return {"kept": kept, "polished": polish_widths(context)}


def delta_groups(context: Context, activations: Path) -> list[Any]:
    """One search group for each layer, ground and d_new."""
    from jobs.search.studies import Group

    settings, section = context.settings, context.settings.deltas
    fixed = section.model_dump(include=PASSED_ON)
    space = {one: getattr(section.space, one) for one in type(section.space).model_fields}
    groups = []
    for one in context.delta_groups:
        key = keys.delta_group(settings, one)
        folder = keyed_folder(context.space.deltas / one.name, key)
        constants = {
            "layer": one.layer,
            "target": one.ground.target,
            "activations": str(activations),
            "residual": str(folder.parent / "residual"),
            "device": context.device,
            "convention": settings.transcoders.convention,
            "precision": settings.compute.precision,
            "threads": context.share.cpus,
            "checkpoint_seconds": settings.compute.checkpoint_seconds,
            "settings": {**fixed, "d_new": one.d_new, "seed": settings.seed},
        }
        groups.append(
            Group(
                one.name,
                folder,
                space,
                section.trials,
                # The first, random values are the same for every d_new, so that widths are compared like for like.
                keys.search_seed(settings, one.layer, one.ground),
                constants,
                f"{settings.name}/{STAGE}/{one.name}@{key}",
                section.sampler,
                tuple(section.objectives.replace("val_error", error_name(one.ground.target)).split(", ")),
                section.warm_start and f"{section.warm_start}/{STAGE}/{one.name}",
                reads=f"layer_{one.layer:02d}/{one.ground.label}",
            )
        )
    return groups


def trial(config: dict[str, Any], report: Any) -> dict[str, Any]:
    """One delta run; at the end the best replica is in the trial's folder, the others in `replica_1` and so on."""
    environment.prepare()
    import torch

    from models.deltas import write_delta
    from models.transcoder import CONVENTIONS, with_bos
    from trainers.capture import read_bos
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
    activations, layer = Path(config["activations"]), config["layer"]
    at_bos = read_bos(activations)[layer] if config["target"] == "change" else None
    data = pairs(config["target"], activations, Path(config["residual"]), layer, taps, config["device"])
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
        facts = {"target": config["target"], "d_new": settings.d_new, "kept_replica": index, **trained.figures}
        delta = trained.deltas[index] if at_bos is None else with_bos(trained.deltas[index], at_bos)
        write_delta(delta, replica_folder(Path(config["folder"]), rank), facts)
    keeper.forget()
    seal(Path(config["folder"]))
    return trained.figures


def replica_folder(trial: Path, rank: int) -> Path:
    """The folder of one of a trial's seeds, ranked by validation loss; the best, rank 0, has the trial's own."""
    return trial / f"replica_{rank}" if rank else trial


def compute_residual(task: ResidualTask) -> None:
    """Writes y - base(x) of both splits in bf16, one shard for each shard of the activations.

    The manifest, and `base_error.json` beside the folder, hold the base's error on held-out text, as a share of the
    output's variance, in both models' streams.
    """
    import torch

    from models.gemma_scope import Candidate, read
    from models.transcoder import CONVENTIONS
    from trainers.activations import captured_columns, read_index, read_pairs, write_index, write_shard
    from trainers.capture import layer_folder
    from trainers.delta_data import fraction_unexplained, mean_square, output_variance, residual_of

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
            captured = "change" in captured_columns(source)
            facts["change_share"] = captured and mean_square(read_pairs(source, ("change",))) / facts["variance"]
    before = read_pairs(layer_folder(Path(task.unfinetuned), task.layer))
    facts["val_fvu_base_unfinetuned"] = fraction_unexplained(base, before)
    write_json(Path(task.folder).parent / "base_error.json", {"key": task.key, **facts})
    finish_folder(Path(task.folder), task.key, facts)


@lru_cache(maxsize=1)
def pairs(target: str, activations: Path, residual: Path, layer: int, taps: Taps, device: str) -> DeltaData:
    """What the trials of a layer and target share, in the memory of a GPU where it fits; a worker keeps the last."""
    from trainers.delta_data import read_change

    pairs.cache_clear()  # before the next is read
    if target == "change":
        data = read_change(activations, layer, taps)
    else:
        data = read_residuals(activations, residual, layer, taps)
    return data._replace(train=data.train.near(device), validation=data.validation.near(device))


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
    return DeltaData(
        pairs["train"],
        pairs["validation"],
        facts["variance"],
        facts["val_fvu_base"],
        layer,
        "residual",
        facts["change_share"] or None,
        taps,
    )


def _residuals(context: Context, activations: Path) -> None:
    missing = []
    parts = ("residual/train", "residual/validation")
    held = [one for part in parts for one in sorted(context.space.deltas.glob(f"*/*/{part}"))]
    set_damaged_aside(context, held)
    for layer in context.layers_of("residual"):
        for ground in grounds_of(context.settings.deltas, "residual"):
            key = keys.delta_data(context.settings, layer, ground)
            folder = context.space.deltas / f"layer_{layer:02d}" / ground.label / "residual"
            known = (read_json(folder.parent / "base_error.json") or {}).get("key") == key
            whole = all((folder / split / INDEX).is_file() for split in ("train", "validation"))
            if not (is_finished(keyed_folder(folder, key), key) and known and whole):
                missing.append((layer, chosen_base(context, layer, ground.percentile), folder, key))
    if not missing:
        return
    unfinetuned = capture_base(context, ("validation",)) / "validation"
    convention = context.settings.transcoders.convention
    tasks = [
        ResidualTask(
            layer=layer,
            root=root(context),
            candidate=(base.average_l0, base.path),
            activations=str(activations),
            unfinetuned=str(unfinetuned),
            folder=str(folder),
            key=key,
            device=context.device,
            convention=convention,
        )
        for layer, base, folder, key in missing
    ]
    with context.progress.bar("base errors", len(tasks), "bases") as bar:
        for outcome in context.pool.run(compute_residual, tasks, context.settings.compute.max_retries):
            if outcome.error:
                raise WorkFailed(f"errors of {outcome.task.candidate[1]}: {outcome.error}")
            bar.advance()

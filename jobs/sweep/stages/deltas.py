"""Stage 4, deltas: the delta transcoders of every layer, target, base and d_new.

In: the finetuned model, the un-finetuned one, the bases and text. Out: for every group, `deltas/SITE/change/dNNN/`
or `deltas/SITE/pP/dNNN/`, the trials' `trial_NNNN/{delta.safetensors,config.json,result.json}` and `best.json`;
`bases` adds the errors of bases, `polish` may add `deltas/polished/`.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.rows import one_line
from jobs.capture.activations import capture_finetuned
from jobs.capture.bases import (
    Residuals,
    compute_base_errors,
    read_residuals,
    residuals_of,
    without_base_errors,
)
from jobs.capture.moments import fitted_places, write_moments
from jobs.cluster import environment
from jobs.context import keys
from jobs.context.context import Context, error_name
from jobs.context.disk import disk_of, drop, on_gpu
from jobs.context.workspace import replica_folder
from jobs.errors import WorkFailed
from jobs.files import keyed_folder, seal, write_json
from jobs.sweep.polish import polish_widths
from sites import Address, Site, sites_label
from trainers.settings import DeltaSettings, settings_of

if TYPE_CHECKING:
    from torch import Tensor

    from jobs.search.studies import Group
    from trainers.delta_data import DeltaData
    from trainers.delta_stack import TrainedDelta

STAGE = "deltas"


def run(context: Context) -> dict[str, Any]:
    from jobs.search.studies import best_of, missing_trials, trials_of
    from jobs.sweep.stages.evaluate import measure_ceiling
    from jobs.tracking.records import record_trial

    measure_ceiling(context)
    groups, disk = delta_groups(context), disk_of(context)
    needed = {address.site for address in groups}
    if disk.needs_windows:  # activations of finished sites are not captured again
        unfinished = {address.site for address, group in groups.items() if missing_trials(group)}
        needed = unfinished | without_base_errors(context)
    parts = disk.windows(sorted(needed))
    for number, sites in enumerate(parts, start=1):
        if disk.needs_windows:
            context.progress.line(f"  window {number} of {len(parts)}: layers {sites_label(sites)}")
            drop(context, keep=sites)
        capture_finetuned(context, sites)
        compute_base_errors(context, sites)
        _search(context, [group for address, group in groups.items() if address.site in sites], len(groups))
        if disk.needs_windows:
            write_moments(context, [place for place in fitted_places(context) if place[0] in sites])
            drop(context)
    shutil.rmtree(context.space.folder / ".tune", ignore_errors=True)
    best_losses = {}
    for group in groups.values():
        for path in group.folder.glob("trial_*/checkpoint.safetensors"):  # of trials that were stopped early
            path.unlink()
        results = trials_of(group)
        for result in results:  # an earlier driver may have died before tracking them
            record_trial(context.tracker, STAGE, group.name, result)
        best = best_of(results)
        if best is None:
            context.failures.append(f"{STAGE} {group.name}: every trial failed")
            continue
        write_json(group.folder / "best.json", best)
        best_losses[group.name] = best["value"]
    if not best_losses:
        raise WorkFailed("every delta trial failed: " + "; ".join(context.failures))
    return {"kept": best_losses, "polished": polish_widths(context)}


def _search(context: Context, groups: list[Group], total: int) -> None:
    """Runs the missing trials of `groups` (`total` groups in the sweep)."""
    from jobs.search.grouped import Runtime, run_search
    from jobs.search.halving import EarlyStopping

    section, retries = context.settings.deltas, context.settings.compute.max_retries
    one_objective = section.objectives == "val_loss"
    halving = EarlyStopping(section.grace_evals, section.epochs, section.reduction_factor)
    context.pool.close()
    with context.progress.bar("delta studies", section.trials * len(groups), "trials") as bar:
        run_search(
            groups,
            trial,
            Runtime(
                context.studies,
                context.share.of_several(section.workers_per_trial, "deltas.workers_per_trial"),
                retries,
                context.space.folder / ".tune" / STAGE,
                total,
            ),
            early_stopping=halving if section.asha and one_objective and section.epochs > section.grace_evals else None,
            bar=bar,
            on_trial=lambda group, result: context.finish_trial(STAGE, group.name, result),
        )


def delta_groups(context: Context) -> dict[Address, Group]:
    """One search group for each site, ground and d_new."""
    from jobs.search.studies import Group

    settings, section = context.settings, context.settings.deltas
    space = {name: getattr(section.space, name) for name in type(section.space).model_fields}
    groups = {}
    for address in context.delta_groups:
        key = keys.delta_group(settings, address)
        folder = keyed_folder(context.space.deltas / address.folder, key)
        residual = address.ground.target == "residual"
        constants = {
            "site": address.site,
            "target": address.ground.target,
            "activations": str(context.space.activations / "finetuned"),
            "residuals": residual and residuals_of(context, address.site, address.ground)._asdict(),
            "device": context.device,
            "precision": settings.compute.precision,
            "threads": context.share.cpus,
            "workers": section.workers_per_trial,
            "resources": context.share.resources,
            "checkpoint_seconds": settings.compute.checkpoint_seconds,
            "settings": settings_of(DeltaSettings, section, d_new=address.d_new, seed=settings.seed),
        }
        groups[address] = Group(
            address.folder,
            folder,
            space,
            section.trials,
            # The first (random) values are the same for every d_new, for a fair comparison of widths.
            keys.search_seed(settings, address.site, address.ground),
            constants,
            f"{settings.name}/{STAGE}/{address.folder}@{key}",
            section.sampler,
            tuple(section.objectives.replace("val_error", error_name(address.ground.target)).split(", ")),
            section.warm_start and f"{section.warm_start}/{STAGE}/{address.folder}",
            reads=f"{address.site.folder}/{address.ground.label}",
            side_by_side=side_by_side(context),
        )
    return groups


def side_by_side(context: Context) -> int:
    """Number of trials that may train side by side."""
    from jobs.search.studies import STARTUP_TRIALS

    setting = context.settings.deltas.side_by_side
    return setting if setting != "auto" else STARTUP_TRIALS if on_gpu(context) else 1


def trials_at_once(context: Context) -> list[int]:
    """Number of trials in each call of the trial function, for one group."""
    from jobs.search.studies import STARTUP_TRIALS

    section, limit = context.settings.deltas, side_by_side(context)
    independent = section.trials if section.sampler in ("random", "grid") else min(section.trials, STARTUP_TRIALS)
    full, remainder = divmod(independent, limit)
    return [limit] * full + [remainder] * (remainder > 0) + [1] * (section.trials - independent)


def trial(config: dict[str, Any], report: Any) -> dict[str, Any]:
    """One delta run, or several side by side, here or on several workers. At the end each trial's folder holds its best
    replica, with the others in `replica_1` and so on."""
    environment.prepare()
    if config["workers"] == 1:
        return train(config, report)
    from jobs.search.several_workers import train_together

    return train_together(train, config)


def train(config: dict[str, Any], report: Any) -> dict[str, Any]:
    """The training itself, in one process or in each of several."""
    import torch

    from trainers.checkpoints import Keeper
    from trainers.delta_transcoder import train_deltas
    from trainers.distributed import processes
    from trainers.errors import DivergedError, TrainingError
    from trainers.precision import resolve_precision

    torch.set_num_threads(config["threads"])
    writes = processes(config["device"]).index == 0
    side_by_side = config.get("side_by_side")
    members = side_by_side or [config]
    precision = resolve_precision(config["precision"], config["device"])
    settings = [
        replace(config["settings"], lr=values["lr"], sparsity=values["sparsity"], precision=precision)
        for values in ({**config, **member} for member in members)
    ]
    residuals = config["residuals"] and Residuals(
        **{**config["residuals"], "candidate": tuple(config["residuals"]["candidate"])}
    )
    try:
        data = pairs(Path(config["activations"]), config["site"], residuals or None, config["device"])
    except TrainingError as error:  # of the site, so of all its trials
        return (
            {"side_by_side": [{**_failed(error), "history": []} for _ in members]} if side_by_side else _failed(error)
        )
    reported: list[list[dict[str, Any]]] = [[] for _ in members]

    def note(number: int, figures: dict[str, Any]) -> None:
        reported[number].append(figures)
        if not side_by_side:
            report(figures)

    keeper = Keeper(Path(config["folder"]) / "checkpoint.safetensors", config["checkpoint_seconds"])
    outcomes: list[dict[str, Any]] = []
    try:
        for member, trained in zip(
            members, train_deltas(data, settings, device=config["device"], report=note, keeper=keeper), strict=True
        ):
            if isinstance(trained, DivergedError):
                outcomes.append(_failed(trained))
            else:
                if writes:
                    _write(trained, Path(member["folder"]), config, data.scale)
                outcomes.append(trained.figures)
    except torch.OutOfMemoryError as error:
        if config["workers"] > 1:
            raise  # the other workers would wait for this one
        outcomes = [{"apart": True} if side_by_side else _failed(error)]
    keeper.forget()
    if writes:  # after that, because a seal that lists the checkpoint would make the trial count as damaged
        for member, outcome in zip(members, outcomes, strict=False):
            if "failed" not in outcome and "apart" not in outcome:
                seal(Path(member["folder"]))
    if not side_by_side or "apart" in outcomes[0]:
        return outcomes[0]
    return {"side_by_side": [{**outcome, "history": steps} for outcome, steps in zip(outcomes, reported, strict=True)]}


def _failed(error: Exception) -> dict[str, Any]:
    return {"failed": one_line(error, 500)}


def _write(trained: TrainedDelta, folder: Path, config: dict[str, Any], scale: Tensor | None) -> None:
    """Writes a trial's replicas, the best last."""
    from models.deltas import write_delta
    from models.transcoder import with_bos
    from trainers.capture import read_bos

    at_bos = read_bos(Path(config["activations"]))[config["site"]] if config["target"] == "change" else None
    losses = trained.figures["val_loss_replicas"]
    ranked = sorted(range(len(losses)), key=losses.__getitem__)
    for rank, index in reversed(list(enumerate(ranked))):
        facts = {
            "target": config["target"],
            "d_new": config["settings"].d_new,
            "kept_replica": index,
            **trained.figures,
        }
        delta = trained.deltas[index]
        if scale is not None:
            delta = replace(delta, W_dec=delta.W_dec * scale.to(delta.W_dec))
        delta = delta if at_bos is None else with_bos(delta, at_bos)
        write_delta(delta, replica_folder(folder, rank), facts)


@lru_cache(maxsize=1)
def pairs(activations: Path, site: Site, residuals: Residuals | None, device: str) -> DeltaData:
    """The data shared by all trials of a site and ground (`residuals` for residual deltas), in GPU memory if it fits. A
    worker caches the last."""
    from trainers.delta_data import read_change

    pairs.cache_clear()  # before the next is read
    data = read_change(activations, site) if residuals is None else read_residuals(residuals)
    return data._replace(train=data.train.near(device), validation=data.validation.near(device))

"""Second moments of the deltas' training data, for the controls that are fitted to it.

In: a `Context`, sites and the ground under their deltas. Out: a file for each site and ground, next to the activations
that it is computed from, which are captured again if they have been deleted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from evaluators.conditions import CONDITIONS
from jobs.capture.activations import capture_finetuned, finetuned_folder
from jobs.capture.bases import Residuals, compute_base_errors, residual_folder, residuals_of
from jobs.context.context import Context
from jobs.context.disk import disk_of, drop
from jobs.errors import WorkFailed
from sites import Ground, Site
from trainers.checked_files import is_intact

if TYPE_CHECKING:
    from torch import Tensor

PAIRS = 8192
"""Pairs per read."""
Place = tuple[Site, Ground]


class MomentsTask(NamedTuple):
    """Task of one file: a site's activations in the finetuned model, or a base's errors, and the file to write."""

    activations: str
    site: Site
    residuals: Residuals | None
    file: str
    device: str


def moments_file(context: Context, site: Site, ground: Ground) -> Path:
    if ground.target == "residual":
        return residual_folder(context, site, ground) / "moments.safetensors"
    return context.space.activations / "finetuned" / "moments" / f"{site.folder}.safetensors"


def fitted_places(context: Context) -> list[Place]:
    """Each (site, ground) for which an enabled control is fitted to the training target."""
    controls = [CONDITIONS[name] for name in context.settings.evaluate.controls if CONDITIONS[name].ranked]
    targets = {target for control in controls for target in control.targets}
    return list(
        dict.fromkeys((group.site, group.ground) for group in context.delta_groups if group.ground.target in targets)
    )


def write_moments(context: Context, places: Sequence[Place]) -> None:
    """Computes the missing moments of these sites and grounds."""
    finetuned_folder(context)  # empties it if it is from other settings
    missing = [place for place in places if not is_intact(moments_file(context, *place))]
    disk = disk_of(context)
    for sites in disk.windows(sorted({site for site, _ in missing})):
        if disk.needs_windows:
            drop(context, keep=sites)
        capture_finetuned(context, sites)
        if any(ground.target == "residual" for site, ground in missing if site in sites):
            compute_base_errors(context, sites)
        tasks = [_task(context, *place) for place in missing if place[0] in sites]
        with context.progress.bar("moments of what deltas explain", len(tasks), "layers") as bar:
            for outcome in context.pool.run(compute_moments, tasks, context.settings.compute.max_retries):
                if outcome.error:
                    raise WorkFailed(f"moments in {outcome.task.file}: {outcome.error}")
                bar.advance()
    if missing and disk.needs_windows:
        drop(context)


def _task(context: Context, site: Site, ground: Ground) -> MomentsTask:
    activations = context.space.activations / "finetuned"
    residuals = residuals_of(context, site, ground) if ground.target == "residual" else None
    return MomentsTask(str(activations), site, residuals, str(moments_file(context, site, ground)), context.device)


def compute_moments(task: MomentsTask) -> None:
    """Reads the pairs once, on the worker's device, and writes their moments. The captured x is a transcoder's input,
    whatever the convention."""
    from evaluators.splice.second_moments import Moments
    from trainers.checked_files import save
    from trainers.delta_data import change_pairs

    if task.residuals is not None:
        all_pairs = task.residuals.pairs("train")
    else:
        all_pairs = change_pairs(Path(task.activations), "train", task.site)

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for x, target in all_pairs.in_order(PAIRS):
            yield x.to(task.device).float(), target.to(task.device).float()

    save(Path(task.file), Moments.of(pairs())._asdict())

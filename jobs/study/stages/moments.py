"""Second moments of what deltas were trained on, for the controls that are fitted to it.

In: a `Context` with trained deltas, layers and the ground under them. Out: a file for each layer and ground beside the
activations that it is made from; these are captured again where they have been deleted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from evaluators.conditions import CONDITIONS
from jobs.errors import WorkFailed
from jobs.study.context import Context
from jobs.study.disk import drop, in_windows, windows
from jobs.study.grounds import Ground, grounds_of
from jobs.study.stages.activations import capture_finetuned
from jobs.study.stages.base_errors import compute_base_errors, residual_folder
from trainers.checked_files import is_intact

if TYPE_CHECKING:
    from torch import Tensor

PAIRS = 8192
"""Pairs that are read at a time."""


class MomentsTask(NamedTuple):
    """The folders of x and of what is explained there, the latter's column, and the file to write."""

    inputs: str
    targets: str
    column: str
    file: str
    device: str
    convention: str


def moments_file(context: Context, layer: int, ground: Ground) -> Path:
    if ground.target == "residual":
        return residual_folder(context, layer, ground) / "moments.safetensors"
    return context.space.activations / "finetuned" / "moments" / f"layer_{layer:02d}.safetensors"


def write_moments(context: Context, layers: Sequence[int], grounds: Sequence[Ground] = ()) -> None:
    """What is missing of the moments of these layers, under all grounds unless they are given; nothing where no control
    needs any."""
    if not any(CONDITIONS[name].ranked for name in context.settings.evaluate.controls):
        return
    asked = grounds or [
        one for target in context.settings.deltas.targets for one in grounds_of(context.settings.deltas, target)
    ]
    files = {
        (layer, ground): moments_file(context, layer, ground)
        for ground in asked
        for layer in context.layers_of(ground.target)
        if layer in layers
    }
    missing = {place: path for place, path in files.items() if not is_intact(path)}
    parted = in_windows(context)
    for part in windows(context, sorted({layer for layer, _ in missing})):
        activations = capture_finetuned(context, part)
        compute_base_errors(context, activations, part)
        tasks = [_task(context, *place, path) for place, path in missing.items() if place[0] in part]
        with context.progress.bar("moments of what deltas explain", len(tasks), "layers") as bar:
            for outcome in context.pool.run(compute_moments, tasks, context.settings.compute.max_retries):
                if outcome.error:
                    raise WorkFailed(f"moments of {outcome.task.targets}: {outcome.error}")
                bar.advance()
        if parted:
            drop(context, part)


def _task(context: Context, layer: int, ground: Ground, path: Path) -> MomentsTask:
    inputs = context.space.activations / "finetuned" / "train" / f"layer_{layer:02d}"
    residual = ground.target == "residual"
    targets = residual_folder(context, layer, ground) / "train" if residual else inputs
    convention = context.settings.transcoders.convention
    return MomentsTask(str(inputs), str(targets), ground.target, str(path), context.device, convention)


def compute_moments(task: MomentsTask) -> None:
    """Reads the pairs once, on the worker's device, and writes their moments."""
    from evaluators.splice.moments import Moments
    from models.bridge import read_input
    from models.transcoder import CONVENTIONS
    from trainers.activations import read_pairs
    from trainers.checked_files import save

    taps = CONVENTIONS[task.convention]
    inputs, targets = read_pairs(Path(task.inputs), ("x",)), read_pairs(Path(task.targets), (task.column,))

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for (x,), (target,) in zip(inputs.in_order(PAIRS), targets.in_order(PAIRS), strict=True):
            yield read_input(taps, x.to(task.device).float()), target.to(task.device).float()

    save(Path(task.file), Moments.of(pairs())._asdict())

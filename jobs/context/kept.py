"""The deltas that a sweep's searches kept: the best trial of each group, and the folder of what is spliced in.

In: a `Context` and what names a group of deltas. Out: figures and folders; None where no trial succeeded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.context.context import Context
from jobs.context.grounds import DeltaGroup
from jobs.files import read_json


def best_of_group(context: Context, group: DeltaGroup) -> dict[str, Any] | None:
    return read_json(context.space.deltas / group.name / "best.json")


def delta_folder(context: Context, group: DeltaGroup) -> Path | None:
    """Where the delta of a group that is spliced in lies: the one kept by the search, or what joint polish made of it;
    None where no trial succeeded."""
    best = best_of_group(context, group)
    if best is None:
        return None
    together = polished_folder(context, group.d_new) / f"layer_{group.layer:02d}"
    if group.ground.target == "change" and context.settings.deltas.polish_steps and together.is_dir():
        return together
    return context.space.deltas / group.name / f"trial_{best['trial']:04d}"


def polished_folder(context: Context, d_new: int) -> Path:
    return context.space.deltas / "polished" / f"d{d_new:03d}"


def replica_folder(trial: Path, rank: int) -> Path:
    """The folder of one of a trial's seeds, ranked by validation loss; the best, rank 0, has the trial's own."""
    return trial / f"replica_{rank}" if rank else trial

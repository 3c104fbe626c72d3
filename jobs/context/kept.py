"""The deltas that a sweep's searches kept: the best trial of each group, and the folder of what is spliced in.

In: a `Context` and the address of a group of deltas. Out: figures and folders; None where no trial succeeded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.context.context import Context
from jobs.files import read_json
from sites import Address, width_label


def best_of_group(context: Context, group: Address) -> dict[str, Any] | None:
    return read_json(context.space.deltas / group.folder / "best.json")


def trial_folder(context: Context, group: Address) -> Path | None:
    """The folder of the trial that the search kept."""
    best = best_of_group(context, group)
    return None if best is None else context.space.deltas / group.folder / f"trial_{best['trial']:04d}"


def delta_folder(context: Context, group: Address) -> Path | None:
    """The folder of the delta of a group that is spliced in: the one kept by the search, or what joint polish made of
    it; None where no trial succeeded."""
    kept = trial_folder(context, group)
    together = polished_folder(context, group.d_new) / group.site.folder
    polished = group.ground.target == "change" and context.settings.deltas.polish_steps and together.is_dir()
    return together if kept is not None and polished else kept


def polished_folder(context: Context, d_new: int) -> Path:
    return context.space.deltas / "polished" / width_label(d_new)


def replica_folder(trial: Path, rank: int) -> Path:
    """The folder of one of a trial's seeds, ranked by validation loss; the best, rank 0, has the trial's own."""
    return trial / f"replica_{rank}" if rank else trial


def error_name(target: str) -> str:
    """What a target's deltas leave unexplained, as figures call it: a share of the change, or of the output's
    variance."""
    return "val_unexplained" if target == "change" else "val_fvu"

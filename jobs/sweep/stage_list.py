"""The stages of a sweep, in order: where each writes its results, and the key that says whether they are up to date.

In: a `Context`. Out: folders and keys; nothing is run here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jobs.context import keys
from jobs.context.context import Context
from jobs.context.workspace import FINETUNED, PAIR
from jobs.files import MANIFEST, SEAL, files_in, is_finished


class Stage(NamedTuple):
    """One step of a study, run by `run(context)` in the module of the same name. When it is done, its manifest in
    `folder` holds `key`, and the seal next to it lists the files it wrote: those that match the patterns `leaves`
    in the sweep's folder."""

    name: str
    folder: Callable[[Context], Path]
    key: Callable[[Context], str]
    parameters: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()

    def files(self, context: Context) -> list[Path]:
        """The existing files that this stage writes."""
        roots = [path for pattern in self.leaves for path in sorted(context.space.folder.glob(pattern))]
        paths = [path for root in roots for path in files_in(root)]
        marks = (self.folder(context) / MANIFEST, self.folder(context) / SEAL)
        return [path for path in paths if path not in marks and not (self.name == "data" and "answered" in path.parts)]

    def drop(self, context: Context) -> None:
        """Makes the stage count as not done."""
        for name in (MANIFEST, SEAL):
            (self.folder(context) / name).unlink(missing_ok=True)

    def finished(self, context: Context) -> bool:
        return is_finished(self.folder(context), self.key(context))


STAGES = (
    Stage("data", lambda c: c.space.data, lambda c: keys.data(c.settings), ("data",), ("data",)),
    Stage(
        "lora",
        lambda c: c.space.lora,
        lambda c: keys.finetuned_check(c.settings),
        ("model", "lora"),
        ("lora", "data/answered", FINETUNED, PAIR),
    ),
    Stage(
        "transcoders",
        lambda c: c.space.transcoders,
        lambda c: keys.transcoders(c.settings, c.sites_of("residual")),
        ("activations", "transcoders"),
        ("transcoders",),
    ),
    Stage(
        "deltas",
        lambda c: c.space.deltas,
        lambda c: keys.deltas(c.settings, c.delta_groups),
        ("deltas",),
        ("deltas",),
    ),
    Stage(
        "evaluate",
        lambda c: c.space.cells,
        lambda c: keys.evaluate(c.settings, c.delta_groups),
        ("evaluate",),
        ("cells", "generations", "checks_*.json"),
    ),
    Stage("report", lambda c: c.space.report, lambda c: keys.report(c.settings, c.delta_groups), (), ("report",)),
)
NAMES = tuple(stage.name for stage in STAGES)

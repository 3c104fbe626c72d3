"""The stages of a study, in order: where each writes its results, and the key that says whether they are up to date.

In: a `Context`. Out: folders and keys; nothing is run here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from jobs.files import is_finished
from jobs.study import keys
from jobs.study.context import Context


class Stage(NamedTuple):
    """One step of a study, run by `run(context)` in the module of its name; when done, its manifest in `folder` holds
    `key`."""

    name: str
    folder: Callable[[Context], Path]
    key: Callable[[Context], str]
    parameters: tuple[str, ...] = ()

    def finished(self, context: Context) -> bool:
        return is_finished(self.folder(context), self.key(context))


STAGES = (
    Stage("data", lambda c: c.space.data, lambda c: keys.data(c.settings), ("data",)),
    Stage("lora", lambda c: c.space.lora, lambda c: keys.finetuned_check(c.settings), ("model", "lora")),
    Stage(
        "transcoders",
        lambda c: c.space.transcoders,
        lambda c: keys.transcoders(c.settings, c.layers_of("residual")),
        ("activations", "transcoders"),
    ),
    Stage("deltas", lambda c: c.space.deltas, lambda c: keys.deltas(c.settings, c.delta_groups), ("deltas",)),
    Stage("evaluate", lambda c: c.space.cells, lambda c: keys.evaluate(c.settings, c.delta_groups), ("evaluate",)),
    Stage("report", lambda c: c.space.report, lambda c: keys.report(c.settings, c.delta_groups)),
)
NAMES = tuple(stage.name for stage in STAGES)

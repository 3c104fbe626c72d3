"""A piece of evaluation as plain values, and what the pieces of every kind have in common.

In: paths, sites and settings. Out: the names of the cells, each with the key that it must hold, and what they cost; on
a worker, passes of the model, what is spliced into it, and the cells' files. Nothing is loaded before that.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

from jobs.capture.worker_memory import ModelSpec, paths, prefixes
from jobs.evaluation.materials import Materials, Shared, SitePlan
from jobs.files import write_json
from sites import Ground, SetAddress, Site


def cell_name(kind: str, *parts: object) -> str:
    """What a cell's file is called: `ranking_layer_00-29_change_d032`, `raw_tool`. Empty parts are left out."""
    return "_".join(str(part) for part in (kind, *parts) if part != "")


class Timing(NamedTuple):
    """How long a machine that nothing has run on should take, in seconds: for passes over whole rows, and to answer
    rows token by token, through all layers or as many as the second argument says. A subset has `prompts` rows."""

    n_layers: int
    prompts: int
    subsets: int
    passes: Callable[..., float]
    answers: Callable[..., float]


@dataclass(frozen=True)
class Work:
    """What a worker is given: sites that share a model, and the cells to compute for them.

    Each kind of cell is a subclass. It says what its pieces are (`plan`), what a worker does (`compute`), what that
    costs (`cost`, `seconds`), and which of a cell's fields tell it from others (`columns`).
    """

    kind: ClassVar[str]
    """As the cells' files say it."""
    columns: ClassVar[tuple[str, ...]]
    """Fields of a cell that trackers show as its parameters."""
    first: ClassVar[bool] = False
    """Whether other kinds read its cells, so that they are computed before."""

    name: str
    """That of the cell, or what the names of its cells begin with."""
    key: str
    model: ModelSpec
    shared: Shared
    sites: tuple[SitePlan, ...] = ()
    subset: str = ""
    """Empty: all subsets."""
    seed: int = 0

    @classmethod
    def plan(cls, materials: Materials) -> Sequence[Work]:
        """The pieces of this kind that an evaluation consists of."""
        raise NotImplementedError

    def compute(self, model: Any, rows: list[Any]) -> list[str]:
        """Computes the cells, on a worker, and returns their names."""
        raise NotImplementedError

    def cost(self, n_layers: int) -> int:
        """How long it takes, in layers for each row: passes times the layers above the first splice."""
        raise NotImplementedError

    def seconds(self, timing: Timing) -> float:
        """How long each of its cells should take on a GPU that nothing has run on."""
        raise NotImplementedError

    @property
    def units(self) -> int:
        """In how many parts workers could share it out, for forecasts."""
        return len(self.cells())

    @property
    def affinity(self) -> tuple[Any, ...]:
        """Work of one affinity shares a model and everything computed below the first spliced site."""
        return (self.model.folder, self.sites[0].site) if self.sites else (self.model.folder, self.name)

    @property
    def fitted(self) -> bool:
        """Whether it needs the moments of what its deltas were trained on."""
        return False

    def cells(self) -> dict[str, str]:
        """The cells it will write, by name, and the key each must hold."""
        return {self.name: self.key}

    def reusable(self, done: Mapping[str, Sequence[float]]) -> set[str]:
        """Those of the finished cells that need not be computed again; `done` says of each with which strengths it was
        measured."""
        return set(done)

    def remaining(self, done: set[str]) -> Self:
        """The same work without the cells in `done`."""
        return self

    def is_finished(self) -> bool:
        """Whether work without cells has left what it makes."""
        return False

    def above(self, n_layers: int) -> int:
        """Layers from the first spliced one on."""
        return n_layers - self.sites[0].site.layer if self.sites else n_layers

    def cell_file(self, name: str) -> Path:
        return Path(self.shared.cells) / f"{name}.json"

    def plain_passes(self, model: Any) -> Any:
        from evaluators.splice.passes import Passes

        return Passes(model, self.shared.batch_size)

    def kept_passes(self, model: Any) -> Any:
        """Passes that reuse what this worker keeps of the raw model at the first spliced site."""
        return replace(self.plain_passes(model), prefixes=prefixes(self.model, self.sites[0].site))

    def load_patches(self) -> list[Any]:
        """What is spliced in at the sites: their grounds and deltas, on the worker's device."""
        from evaluators.splice.interventions import Patch
        from models.deltas import read_delta
        from models.gemma_scope import Candidate, read

        without_base = tuple(plan.site for plan in self.sites if plan.candidate is None)
        before = paths(self.model, self.shared.base_model, without_base) if without_base else {}
        patches = []
        for plan in self.sites:
            base = plan.candidate and read(plan.root, Candidate(*plan.candidate), plan.site)
            patch = Patch(plan.site, base or before[plan.site], read_delta(Path(plan.delta)))
            patches.append(patch.to(self.model.device))
        return patches

    def write(self, figures: dict[str, Any], started: float) -> list[str]:
        """Writes the one cell of work that consists of it; returns its name."""
        ground = self.sites[0].ground
        cell = {
            "kind": self.kind,
            "target": ground.target,
            "layers": [plan.site.key for plan in self.sites],
            "percentile": ground.percentile,
            "d_new": self.sites[0].d_new,
            "seed": self.seed,
            "key": self.key,
            "seconds": time.perf_counter() - started,
            **figures,
        }
        write_json(self.cell_file(self.name), cell)
        return [self.name]


def place_of(sites: Sequence[Site], ground: Ground, d_new: int) -> str:
    """The part of a cell's name that says what is spliced in: `layer_00-29_change_d032`."""
    return SetAddress(tuple(sites), ground, d_new).name

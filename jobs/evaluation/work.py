"""A piece of evaluation as plain values: what a worker has to do, on which model, and the cells it will write.

In: paths, layers, conditions and strengths, filled in by the evaluate stage. Out: the names of the cells, each with the
key it must hold; nothing is loaded or computed here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from evaluators.conditions import CONDITIONS
from evaluators.splice.limits import Limits
from jobs.capture.worker_memory import ModelSpec
from jobs.context.grounds import Ground

NAMED = {"no_delta": 0.0, "full": 1.0}
"""Conditions that are strengths of the delta."""


@dataclass(frozen=True)
class Evaluation:
    """What all pieces of a sweep's evaluation share. `cells` is a folder, `rows` a file, `base_model` the folder of the
    un-finetuned model."""

    cells: str
    rows: str
    ranking_rows: str
    base_model: str
    subsets: tuple[str, ...]
    limits: Limits
    batch_size: int
    behaviours: dict[str, Any]
    """As the settings name them."""


class SitePlan(NamedTuple):
    """A site as files: the delta's folder, the moments of what it was trained on, and, where the ground is a base
    transcoder, where that is. `key` is that of the site's reconstruction cell."""

    layer: int
    ground: Ground
    d_new: int
    delta: str
    moments: str
    root: str = ""
    candidate: tuple[float, str] | None = None
    key: str = ""

    @property
    def cell(self) -> str:
        return f"reconstruction_layer_{self.layer:02d}_{self.ground.label}_d{self.d_new:03d}"


@dataclass(frozen=True)
class Work:
    """What a worker is given: sites that share a model, and the cells to compute for them. An empty `subset` means all
    subsets."""

    kind: str
    name: str
    key: str
    model: ModelSpec
    shared: Evaluation
    sites: tuple[SitePlan, ...] = ()
    subset: str = ""
    conditions: tuple[str, ...] = ()
    doses: tuple[float, ...] = ()
    control_doses: tuple[float, ...] = ()
    """Strengths of the controls that have one."""
    ranking: str = ""
    """The cell that ranks the sites' features."""
    features: tuple[tuple[int, int], ...] = ()
    """Those that are looked at one by one: layer, and number."""
    seed: int = 0

    @property
    def strengths(self) -> tuple[float, ...]:
        """Every alpha to measure: the doses, plus 0 for no_delta and 1 for full."""
        return tuple(sorted({*self.doses, *(NAMED[one] for one in self.conditions if one in NAMED)}))

    @property
    def controls(self) -> tuple[str, ...]:
        return tuple(one for one in self.conditions if one not in NAMED)

    @property
    def group(self) -> tuple[Any, ...]:
        """Work in one group shares a model and everything computed below the first spliced layer."""
        return (self.model.folder, self.sites[0].layer) if self.sites else (self.model.folder, self.name)

    def cells(self) -> dict[str, str]:
        """The cells it will write, by name, and the key each must hold."""
        if self.kind in ("raw", "cards", "ranking", "curve", "change"):
            return {self.name: self.key}
        if self.kind == "reconstruction":
            return {plan.cell: plan.key for plan in self.sites}
        if self.kind == "exactness":
            return {}
        return {self.cell_name(*one): self.key for one in self.asked}

    @property
    def asked(self) -> list[tuple[str, float | None]]:
        """Every condition of a behaviour cell, with its strength where it has one."""
        dosed: list[tuple[str, float | None]] = [("alpha", dose) for dose in self.doses]
        for condition in self.conditions:
            if CONDITIONS[condition].dosed:
                dosed += [(condition, dose) for dose in self.control_doses]
            else:
                dosed.append((condition, None))
        return dosed

    def cell_name(self, condition: str, alpha: float | None) -> str:
        if not self.sites:
            return self.name
        return f"{self.name}_{condition}{alpha!r}" if CONDITIONS[condition].dosed else f"{self.name}_{condition}"

    def staying(self, done: Mapping[str, Sequence[float]]) -> set[str]:
        """Those of the finished cells that need not be made again; `done` says of each with which strengths it was
        measured. Where one of these is missing, all are made again: they were rows of the same batches, on which the
        last bits depend."""
        if self.kind not in ("behaviour", "width"):
            return set(done)
        strengths = {
            self.cell_name(*one): NAMED.get(one[0], one[1]) for one in self.asked if one[0] not in self.controls
        }
        missing = {strength for name, strength in strengths.items() if name not in done}
        return {name for name, together in done.items() if not missing & set(together)}

    def without(self, done: set[str]) -> Work:
        """The same work without the cells in `done`."""
        if self.kind == "reconstruction":
            return replace(self, sites=tuple(plan for plan in self.sites if plan.cell not in done))
        if self.kind not in ("behaviour", "width"):
            return self
        return replace(
            self,
            doses=tuple(dose for dose in self.doses if self.cell_name("alpha", dose) not in done),
            conditions=tuple(
                one
                for one in self.conditions
                if not all(self.cell_name(*asked) in done for asked in self.asked if asked[0] == one)
            ),
        )

"""Which deltas a study trains: on what ground, in which layer, how wide; and what their folders are called.

In: settings and layers. Out: one `Ground` for each target and base, and one `DeltaGroup` for each study of trials.
"""

from __future__ import annotations

from typing import NamedTuple

from search_spaces.schema import Deltas


def selection_label(percentile: float | None) -> str:
    """The name of a base's selection in file and group names: `p0.25`, or `l0` for a target L0."""
    return "l0" if percentile is None else f"p{percentile:.2f}"


class Ground(NamedTuple):
    """What lies under a delta: the un-finetuned MLP (target `change`), or the base transcoder that a percentile (None:
    the target L0) selects (target `residual`)."""

    target: str
    percentile: float | None = None

    @property
    def label(self) -> str:
        """As in names of folders and cells: `change`, `p0.25`, `l0`."""
        return "change" if self.target == "change" else selection_label(self.percentile)


class DeltaGroup(NamedTuple):
    """Deltas whose losses compare."""

    layer: int
    ground: Ground
    d_new: int

    @property
    def name(self) -> str:
        return f"layer_{self.layer:02d}/{self.ground.label}/d{self.d_new:03d}"


def error_name(target: str) -> str:
    """What a target's deltas leave is called: a share of the change, or of the output's variance."""
    return "val_unexplained" if target == "change" else "val_fvu"


def grounds_of(section: Deltas, target: str) -> list[Ground]:
    """The grounds of one target; none where it is not asked for."""
    if target not in section.targets:
        return []
    return [Ground("change")] if target == "change" else [Ground("residual", one) for one in section.selections]

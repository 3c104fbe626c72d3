"""Which features of the deltas are on: all but some, or only some, named singly or by group.

In: names as the report writes them (`L17F042`, `L17-qkvF042`, `group 3`), a sweep, and its deltas. Out: the same
deltas, in which the other features never fire. The numbers of features stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jobs.context.context import Context
from jobs.errors import RequestError
from sites import KINDS, MLP, Ground, Site

if TYPE_CHECKING:
    from models.transcoder import Transcoder

KIND_NAMES = "|".join(KINDS)
FEATURE = re.compile(rf"(?:residual-)?L(?P<layer>\d+)(?:-(?P<kind>{KIND_NAMES}))?F(?P<feature>\d+)", re.IGNORECASE)
GROUP = re.compile(r"group\s*(?P<number>\d+)", re.IGNORECASE)


@dataclass(frozen=True)
class FeatureChoice:
    """Features that are off (`without`), or all that are on (`only`, where empty means all). Features at BOS stay on
    unless `without` names them."""

    without: Sequence[str] = ()
    only: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.without and self.only:
            raise RequestError("--only: cannot be combined with --without")

    def __bool__(self) -> bool:
        return bool(self.without or self.only)

    def __str__(self) -> str:
        words = [*(f"without {name}" for name in self.without), *(f"only {name}" for name in self.only)]
        return ", ".join(words)


EVERY_FEATURE = FeatureChoice()


def chosen_features(
    context: Context, deltas: Mapping[Site, Transcoder], chosen: tuple[Ground, int], choice: FeatureChoice
) -> dict[Site, Transcoder]:
    """The deltas with only the chosen features. Raises RequestError for a name that is not one of theirs."""
    import torch

    from models.transcoder import silenced

    if not choice:
        return dict(deltas)
    option, names = ("--without", choice.without) if choice.without else ("--only", choice.only)
    named = {feature for name in names for feature in _features(context, deltas, chosen, option, name)}
    edited = {}
    for site, delta in deltas.items():
        selected = torch.tensor([(site, number) in named for number in range(delta.d_sae)])
        at_bos = torch.zeros_like(selected) if delta.at_bos is None else delta.at_bos > 0
        edited[site] = silenced(delta, selected if choice.without else ~selected & ~at_bos)
    return edited


def grouping_of(context: Context, ground: Ground, d_new: int) -> dict[str, Any] | None:
    """The cell with the groups of these deltas' features, if the sweep has made groups."""
    cells = context.cells_of("grouping")
    return next((cell for cell in cells if (cell["target"], cell["d_new"]) == (ground.target, d_new)), None)


def _features(
    context: Context, deltas: Mapping[Site, Transcoder], chosen: tuple[Ground, int], option: str, name: str
) -> list[tuple[Site, int]]:
    if (match := GROUP.fullmatch(name.strip())) is not None:
        return [feature for feature in _group(context, chosen, option, int(match["number"])) if feature[0] in deltas]
    match = FEATURE.fullmatch(name.strip())
    if match is None:
        raise RequestError(
            f"{option}: got {name!r}; a feature is written like L17F042 or L17-qkvF042, a group like 'group 3'"
        )
    kind = KINDS[(match["kind"] or "mlp").lower()]
    residual_mlp = kind is MLP and chosen[0].target == "residual"
    site = Site(int(match["layer"]), context.mlp_kind if residual_mlp else kind)
    number, delta = int(match["feature"]), deltas.get(site)
    if delta is None:
        labels = ", ".join(site.label for site in sorted(deltas))
        raise RequestError(f"{option}: got {name}, but the deltas that are spliced in are at {labels}")
    if number >= delta.d_sae:
        raise RequestError(f"{option}: got {name}, but this delta's features are numbered from 0 to {delta.d_sae - 1}")
    return [(site, number)]


def _group(context: Context, chosen: tuple[Ground, int], option: str, number: int) -> list[tuple[Site, int]]:
    """A group's features, from the sweep's cell of these deltas' groups."""
    groups = (grouping_of(context, *chosen) or {"groups": []})["groups"]
    if not groups:
        raise RequestError(
            f"{option}: the sweep {context.settings.name} has no groups of these deltas' features; a sweep makes "
            "them with evaluate.groups above 0, for the evaluated width of the change deltas"
        )
    for group in groups:
        if group["number"] == number:
            return [(Site.parse(layer), feature) for layer, feature in group["features"]]
    raise RequestError(f"{option}: got group {number}, but the sweep has groups 1 to {len(groups)}")

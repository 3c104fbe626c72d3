"""What a delta is trained on and spliced over, and the only way to write and parse names of deltas and sets of deltas.

In: sites, grounds and widths. Out: folders such as `layer_08/p0.25/d032` and names such as `layer_00-29_change_d032`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from sites.sets import parse_sites, sites_label
from sites.site import Site

TARGET_L0 = "l0"
_NAME = re.compile(r"layer_([^_/]+)([_/])(change|l0|p\d+\.\d+)\2d(\d{3,})")


class Ground(NamedTuple):
    """What lies under a delta: the un-finetuned path (target `change`), or the base transcoder that a percentile (None:
    the target L0) selects (target `residual`)."""

    target: str
    percentile: float | None = None

    @property
    def label(self) -> str:
        """The ground in names of folders and cells: `change`, `p0.25`, `l0`; the inverse of `parse`."""
        if self.target == "change":
            return "change"
        return TARGET_L0 if self.percentile is None else f"p{self.percentile:.2f}"

    @classmethod
    def parse(cls, label: str) -> Ground:
        """Raises ValueError for text that is not a label."""
        if label == "change":
            return cls("change")
        return cls("residual", None if label == TARGET_L0 else float(label.removeprefix("p")))


class Address(NamedTuple):
    """The deltas of one search: they share a site, a ground and a width, so their losses are comparable."""

    site: Site
    ground: Ground
    d_new: int

    @property
    def folder(self) -> str:
        """`layer_08/p0.25/d032`; the inverse of `parse`."""
        return "/".join(_parts([self.site], self.ground, self.d_new))

    @property
    def name(self) -> str:
        """`layer_08_p0.25_d032`."""
        return SetAddress((self.site,), self.ground, self.d_new).name

    @classmethod
    def parse(cls, folder: str) -> Address:
        """Raises ValueError for text that is not such a folder."""
        (site,), ground, d_new = _parse(folder, "/")
        return cls(site, ground, d_new)


class SetAddress(NamedTuple):
    """Deltas of one ground and width that are spliced in at once."""

    sites: tuple[Site, ...]
    ground: Ground
    d_new: int

    @property
    def name(self) -> str:
        """`layer_00-29_change_d032`; the inverse of `parse`."""
        return "_".join(_parts(self.sites, self.ground, self.d_new))

    @classmethod
    def parse(cls, name: str) -> SetAddress:
        """Raises ValueError for text that is not such a name."""
        return cls(*_parse(name, "_"))


def width_label(d_new: int) -> str:
    """A delta's width in names of folders and cells: `d032`."""
    return f"d{d_new:03d}"


def _parts(sites: tuple[Site, ...] | list[Site], ground: Ground, d_new: int) -> list[str]:
    return [f"layer_{sites_label(sites, digits=2)}", ground.label, width_label(d_new)]


def _parse(text: str, separator: str) -> tuple[tuple[Site, ...], Ground, int]:
    match = _NAME.fullmatch(text)
    if match is None or match[2] != separator:
        raise ValueError(f"{text!r} is not a delta's name, such as {separator.join(('layer_08', 'change', 'd032'))}")
    return tuple(parse_sites(match[1])), Ground.parse(match[3]), int(match[4])

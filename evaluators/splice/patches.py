"""What is spliced in at a site: a delta, and the ground under it.

In: a delta of one site and its ground. Out: a checked `Patch`; and the true change, whole or along a few directions,
which can take a delta's place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from models.blocks import BlockPath
from models.errors import ModelError
from models.transcoder import HasSite, Transcoder, check_fits
from sites import Site


class Delta(HasSite, Protocol):
    """What a splice asks of a delta, or of what takes its place."""

    @property
    def at_bos(self) -> Tensor | None:
        """The activations (d_new,) at BOS; None without a feature for it."""

    def encode(self, x: Tensor) -> Tensor:
        """Activations (tokens, d_new) of x (tokens, d_in)."""

    def decode(self, acts: Tensor) -> Tensor:
        """Output (tokens, d_out) of activations (tokens, d_new)."""


@dataclass(frozen=True)
class Patch:
    """What is spliced in at one site. Raises ModelError where its parts are not of that site, or of different widths.

    `ground` is what lies under the delta: a base transcoder, under a delta trained on the residual that it leaves, or
    the un-finetuned block's own path, under a delta trained on what finetuning changed. `pool` (tokens, d_out) holds
    delta outputs in shuffled order, for the condition that reads them by token number. `ranks` (d_new,) are the
    features' places among those of all sites, the most effective first, for rows that keep only the first of them.
    """

    site: Site
    ground: Transcoder | BlockPath
    delta: Delta | None = None
    pool: Tensor | None = None
    ranks: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ground.site != self.site:
            raise ModelError(f"layer {self.site.label}: what lies under the delta is of layer {self.ground.site.label}")
        if self.delta is not None:
            widths = {"d_in": self.ground.d_in, "d_out": self.ground.d_out}
            check_fits(self.delta, self.site, **widths, origin=f"layer {self.site.label}: delta")

    @property
    def base(self) -> Transcoder | None:
        """The base transcoder, where that is the ground."""
        return self.ground if isinstance(self.ground, Transcoder) else None

    @property
    def path(self) -> BlockPath | None:
        """The un-finetuned path, where that is the ground."""
        return self.ground if isinstance(self.ground, BlockPath) else None

    @property
    def transcoder(self) -> Transcoder:
        """The delta, as something with features; raises ValueError where there is none, or it has none."""
        if not isinstance(self.delta, Transcoder):
            raise ValueError(f"layer {self.site.label} has no delta transcoder, whose features are needed here")
        return self.delta

    def to(self, device: str | torch.device) -> Patch:
        delta = self.delta.to(device) if isinstance(self.delta, Transcoder) else self.delta
        return replace(self, ground=self.ground.to(device), delta=delta)


@dataclass(frozen=True)
class TrueChange:
    """In a delta's place: the change itself, y_finetuned(x) - y_un(x), computed by both paths, at BOS too."""

    unfinetuned: BlockPath
    finetuned: BlockPath
    at_bos: None = None

    @property
    def site(self) -> Site:
        return self.finetuned.site

    @property
    def d_in(self) -> int:
        return self.finetuned.d_in

    @property
    def d_out(self) -> int:
        return self.finetuned.d_out

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, acts: Tensor) -> Tensor:
        return self.finetuned(acts).float() - self.unfinetuned(acts).float()


@dataclass(frozen=True)
class PrincipalChange:
    """In a delta's place: the part of the true change that lies along a few directions, the rows of `W_dec`.

    Their coefficients are those of the change itself, computed by both paths, and not read off x by an encoder: what
    is missing is missing for want of directions, not of features to find them. The row before the last is the change's
    mean, always on; the last is what the change is at BOS.
    """

    true: TrueChange
    W_dec: Tensor

    @property
    def site(self) -> Site:
        return self.true.site

    @property
    def d_in(self) -> int:
        return self.true.d_in

    @property
    def d_out(self) -> int:
        return self.true.d_out

    @property
    def at_bos(self) -> Tensor:
        return torch.eye(len(self.W_dec)).to(self.W_dec)[-1]

    def encode(self, x: Tensor) -> Tensor:
        directions, mean = self.W_dec[:-2], self.W_dec[-2]
        along = (self.true.decode(x) - mean) @ directions.T
        return torch.cat([along, along.new_ones(len(x), 1), along.new_zeros(len(x), 1)], dim=1)

    def decode(self, acts: Tensor) -> Tensor:
        return acts @ self.W_dec

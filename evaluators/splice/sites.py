"""Where deltas are spliced in, and on what ground.

In: a delta of one layer and the ground under it. Out: a checked `Site`; and the true change, whole or along a few
directions, in a shape that can take a delta's place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.blocks import BlockPath
from models.errors import ModelError
from models.transcoder import Taps, Transcoder, check_fits


@dataclass(frozen=True)
class Site:
    """One layer where a delta is spliced in. Raises ModelError where its parts are not of one kind and layer.

    `ground` is what lies under the delta: a base transcoder, under a delta trained on the residual that it leaves, or
    the un-finetuned block's own path, under a delta trained on what finetuning changed. `pool` (tokens, d_model) holds
    delta outputs in shuffled order, for the condition that reads them by token number. `ranks` (d_new,) are the
    features' places among those of all sites, the most effective first, for rows that keep only the first of them.
    """

    layer: int
    ground: Transcoder | BlockPath
    delta: Transcoder | None = None
    pool: Tensor | None = None
    ranks: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ground.layer != self.layer:
            raise ModelError(f"layer {self.layer}: what lies under the delta is of layer {self.ground.layer}")
        if self.delta is None:
            return
        d_model, taps = self.ground.d_model, self.taps
        check_fits(self.delta, d_model=d_model, n_layers=self.layer + 1, taps=taps, origin=f"layer {self.layer}: delta")
        if self.delta.layer != self.layer:
            raise ModelError(f"layer {self.layer}: the delta transcoder is of layer {self.delta.layer}")

    @property
    def taps(self) -> Taps:
        return self.ground.taps

    @property
    def base(self) -> Transcoder | None:
        """The base transcoder, where that is the ground."""
        return self.ground if isinstance(self.ground, Transcoder) else None

    @property
    def path(self) -> BlockPath | None:
        """The un-finetuned path, where that is the ground."""
        return self.ground if isinstance(self.ground, BlockPath) else None

    def to(self, device: str | torch.device) -> Site:
        delta = None if self.delta is None else self.delta.to(device)
        return replace(self, ground=self.ground.to(device), delta=delta)


@dataclass(frozen=True)
class TrueChange:
    """In a delta's place, and with as much of a transcoder's shape as a splice looks at: the change itself,
    y_finetuned(x) - y_un(x), computed by both paths."""

    unfinetuned: BlockPath
    finetuned: BlockPath
    b_dec: None = None

    @property
    def layer(self) -> int:
        return self.finetuned.layer

    @property
    def d_model(self) -> int:
        return self.finetuned.d_model

    @property
    def taps(self) -> Taps:
        return self.finetuned.taps

    def encode(self, x: Tensor) -> Tensor:
        return x

    def decode(self, x: Tensor) -> Tensor:
        return self.finetuned(x).float() - self.unfinetuned(x).float()


@dataclass(frozen=True)
class PrincipalChange:
    """In a delta's place: the part of the true change that lies along a few directions, the rows of `W_dec`.

    Their coefficients are those of the change itself, computed by both paths, and not read off x by an encoder: what
    is missing is missing for want of directions, not of features to find them. The row before the last is the change's
    mean, always on; the last is what the change is at BOS.
    """

    true: TrueChange
    W_dec: Tensor
    b_dec: None = None

    @property
    def layer(self) -> int:
        return self.true.layer

    @property
    def d_model(self) -> int:
        return self.true.d_model

    @property
    def taps(self) -> Taps:
        return self.true.taps

    @property
    def at_bos(self) -> Tensor:
        return torch.eye(len(self.W_dec)).to(self.W_dec)[-1]

    def encode(self, x: Tensor) -> Tensor:
        directions, mean = self.W_dec[:-2], self.W_dec[-2]
        along = (self.true.decode(x) - mean) @ directions.T
        return torch.cat([along, along.new_ones(len(x), 1), along.new_zeros(len(x), 1)], dim=1)

    def decode(self, acts: Tensor) -> Tensor:
        return acts @ self.W_dec

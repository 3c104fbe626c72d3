"""Where deltas are spliced in, on what ground, and what takes a delta's place in the controls.

In: a delta of one layer and the ground under it; for the controls also activations. Out: a checked `Site`, and sites
whose delta is random, shuffled or dense.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from models.blocks import BlockPath
from models.errors import ModelError
from models.transcoder import Taps, Transcoder, check_fits, with_bos, without_bos

RIDGE = 1e-6
"""Of the mean squared input, added to each direction: the regression has a solution where inputs are degenerate."""


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


class Material(NamedTuple):
    """What substitutes are made from: `x` (tokens, d_model), what the site's transcoders read of the text in the raw
    model, token by token; training pairs of the delta, (x, residual) or (x, change), in batches; and a seed."""

    x: Tensor
    pairs: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    seed: int


def random_delta(site: Site, material: Material) -> Site:
    """The delta's features with random decoder directions; on the text its output has the same mean squared norm."""
    delta = _delta_of(site)
    generator = torch.Generator().manual_seed(material.seed)
    directions = torch.randn(delta.W_dec.shape, generator=generator).to(delta.W_dec)
    directions *= delta.W_dec.norm(dim=1, keepdim=True) / directions.norm(dim=1, keepdim=True)
    acts = delta.encode(material.x)
    wanted, made = (acts @ delta.W_dec).norm(), (acts @ directions).norm()
    return replace(site, delta=replace(delta, W_dec=directions * (wanted / made if made > 0 else 1.0)))


def shuffled_delta(site: Site, material: Material) -> Site:
    """The delta's outputs on the text, each at the place of another token; a feature at BOS stays."""
    outputs = _delta_of(site)(material.x)
    order = torch.randperm(len(outputs), generator=torch.Generator().manual_seed(material.seed))
    return replace(site, pool=outputs[order.to(outputs.device)])


def dense_delta(site: Site, material: Material) -> Site:
    """The linear map of rank d_new that best fits what the delta was trained on (reduced-rank regression); a feature at
    BOS stays."""
    delta = _delta_of(site)
    encoder, decoder = reduced_rank_regression(material.pairs(), without_bos(delta).d_sae)
    encoder, decoder = encoder.to(delta.W_enc), decoder.to(delta.W_dec)
    # z = relu(z) - relu(-z): twice as many features make a transcoder linear.
    zeros = torch.zeros(2 * encoder.shape[1]).to(encoder)
    W_enc, W_dec = torch.cat([encoder, -encoder], dim=1), torch.cat([decoder, -decoder])
    dense = replace(delta, W_enc=W_enc, W_dec=W_dec, b_enc=zeros, threshold=zeros)
    return replace(site, delta=dense if delta.at_bos is None else with_bos(dense, delta.at_bos @ delta.W_dec))


def reduced_rank_regression(pairs: Iterable[tuple[Tensor, Tensor]], rank: int) -> tuple[Tensor, Tensor]:
    """`encoder` (d_in, rank) and `decoder` (rank, d_out), fp64 on the CPU, that minimise the squared norm of
    `x @ encoder @ decoder - y` over the pairs (x (tokens, d_in), y (tokens, d_out)).

    The least-squares map, projected on the leading directions of what it fits (Izenman 1975). Raises ValueError without
    pairs.
    """
    squares = products = None
    for x, y in pairs:
        x, y = x.double(), y.double()
        inner, cross = (x.T @ x).cpu(), (x.T @ y).cpu()
        squares = inner if squares is None else squares + inner
        products = cross if products is None else products + cross
    if squares is None or products is None:
        raise ValueError("a regression needs at least one pair")
    squares += RIDGE * squares.diagonal().mean() * torch.eye(len(squares), dtype=torch.float64)
    least_squares = torch.linalg.solve(squares, products)
    _, directions = torch.linalg.eigh(products.T @ least_squares)  # ascending
    leading = directions[:, -rank:]
    return least_squares @ leading, leading.T.contiguous()


def _delta_of(site: Site) -> Transcoder:
    if site.delta is None:
        raise ValueError(f"layer {site.layer} has no delta that another could replace")
    return site.delta


SUBSTITUTES: dict[str, Callable[[Site, Material], Site]] = {
    "random_delta": random_delta,
    "shuffled_delta": shuffled_delta,
    "dense_delta": dense_delta,
}
"""By condition, what makes the site whose delta is something else."""

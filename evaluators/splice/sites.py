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


class Material(NamedTuple):
    """What substitutes are made from: `x` (tokens, d_model), what the site's transcoders read of the text in the raw
    model, token by token; training pairs of the delta, (x, residual) or (x, change), in batches; a seed; and, for the
    one that needs it, the layer's true change."""

    x: Tensor
    pairs: Callable[[], Iterable[tuple[Tensor, Tensor]]]
    seed: int
    change: Callable[[], TrueChange] | None = None


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


def pca_delta(site: Site, material: Material) -> Site:
    """The change along its d_new principal directions, and its mean (PCA of activation differences, as in
    diffing-toolkit); a feature at BOS stays. Raises ValueError where the material has no true change."""
    delta = _delta_of(site)
    if material.change is None:
        raise ValueError(f"layer {site.layer}: principal directions are of a change, which is not known here")
    mean, directions = principal_directions((c for _, c in material.pairs()), without_bos(delta).d_sae)
    at_bos = torch.zeros_like(mean) if delta.at_bos is None else (delta.at_bos @ delta.W_dec).to(mean)
    rows = torch.cat([directions, mean.unsqueeze(0), at_bos.unsqueeze(0)])
    return replace(site, delta=PrincipalChange(material.change(), rows.to(delta.W_dec)))  # type: ignore[arg-type]


def principal_directions(batches: Iterable[Tensor], count: int) -> tuple[Tensor, Tensor]:
    """The mean (d,) of the rows of all batches (tokens, d) and their `count` leading principal directions (at most d,
    d), orthonormal, in fp64 on the CPU. Raises ValueError without batches."""
    tokens, total, squares = 0, None, None
    for batch in batches:
        batch = batch.double()
        first, second = batch.sum(0).cpu(), (batch.T @ batch).cpu()
        tokens += len(batch)
        total, squares = (first, second) if total is None or squares is None else (total + first, squares + second)
    if total is None or squares is None:
        raise ValueError("principal directions need at least one batch")
    mean = total / tokens
    _, directions = torch.linalg.eigh(squares / tokens - torch.outer(mean, mean))  # ascending
    return mean, directions[:, -count:].T.contiguous()


def _delta_of(site: Site) -> Transcoder:
    if site.delta is None:
        raise ValueError(f"layer {site.layer} has no delta that another could replace")
    return site.delta


SUBSTITUTES: dict[str, Callable[[Site, Material], Site]] = {
    "random_delta": random_delta,
    "shuffled_delta": shuffled_delta,
    "dense_delta": dense_delta,
    "pca_delta": pca_delta,
}
"""By condition, what makes the site whose delta is something else."""

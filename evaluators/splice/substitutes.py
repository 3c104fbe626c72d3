"""The deltas' substitutes in controls: random, shuffled, dense, or the true change along a few directions.

In: a `Patch` with a delta, and the material that its substitute is made from. Out: a patch with the substitute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from evaluators.splice.interventions import Patch
from evaluators.splice.second_moments import Moments, principal_directions, reduced_rank_regression
from models.blocks import BlockPath
from models.transcoder import with_bos
from sites import Site


@dataclass(frozen=True)
class TrueChange:
    """Replaces a delta by the change itself, y_finetuned(x) - y_un(x), computed by both paths, also at BOS."""

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
    """Replaces a delta by the part of the true change that lies along a few directions, the rows of `W_dec`.

    The coefficients come from the change itself, computed by both paths, not from an encoder that reads x: any error is
    due to too few directions, not to an encoder that misses them. The second-to-last row is the change's mean, always
    on; the last is the change at BOS.
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


class Material(NamedTuple):
    """What substitutes are made from, computed only where it is asked for: `x` (tokens, d_in), the site's input on the
    text in the raw model; the moments of the delta's training pairs (x, and residual or change); a seed; and, for
    `pca_delta`, the site's true change."""

    x: Callable[[], Tensor]
    moments: Callable[[], Moments]
    seed: int
    change: Callable[[], TrueChange] | None = None


def random_delta(patch: Patch, material: Material) -> Patch:
    """The delta's features with random decoder directions, scaled to the same mean squared output norm on the text.
    Directions are drawn for each site: in the residual stream, equal ones would add up over layers."""
    delta, site = patch.transcoder, patch.site
    (seed,) = np.random.SeedSequence((material.seed, site.layer, site.kind.order)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(seed))
    directions = torch.randn(delta.W_dec.shape, generator=generator).to(delta.W_dec)
    directions *= delta.W_dec.norm(dim=1, keepdim=True) / directions.norm(dim=1, keepdim=True)
    acts = delta.encode(material.x())
    original, drawn = (acts @ delta.W_dec).norm(), (acts @ directions).norm()
    return replace(patch, delta=replace(delta, W_dec=directions * (original / drawn if drawn > 0 else 1.0)))


def shuffled_delta(patch: Patch, material: Material) -> Patch:
    """The delta's outputs on the text, shuffled over tokens, at all sites in the same way; a BOS feature is kept."""
    outputs = patch.transcoder(material.x())
    order = torch.randperm(len(outputs), generator=torch.Generator().manual_seed(material.seed))
    return replace(patch, pool=outputs[order.to(outputs.device)])


def dense_delta(patch: Patch, material: Material) -> Patch:
    """The linear map of rank d_new that best fits the delta's training pairs (reduced-rank regression); a BOS feature
    is kept."""
    delta = patch.transcoder
    encoder, decoder = reduced_rank_regression(material.moments(), delta.d_new)
    encoder, decoder = encoder.to(delta.W_enc), decoder.to(delta.W_dec)
    # z = relu(z) - relu(-z): twice as many features make a transcoder linear.
    zeros = torch.zeros(2 * encoder.shape[1]).to(encoder)
    W_enc, W_dec = torch.cat([encoder, -encoder], dim=1), torch.cat([decoder, -decoder])
    dense = replace(delta, W_enc=W_enc, W_dec=W_dec, b_enc=zeros, threshold=zeros)
    return replace(patch, delta=dense if delta.at_bos is None else with_bos(dense, delta.at_bos @ delta.W_dec))


def pca_delta(patch: Patch, material: Material) -> Patch:
    """The change along its d_new principal directions, plus its mean (PCA of activation differences, as in
    diffing-toolkit); a BOS feature is kept. Raises ValueError if the material has no true change."""
    delta = patch.transcoder
    if material.change is None:
        raise ValueError(f"layer {patch.site.label}: principal directions are of a change, which is not known here")
    mean, directions = principal_directions(material.moments(), delta.d_new)
    at_bos = torch.zeros_like(mean) if delta.at_bos is None else (delta.at_bos @ delta.W_dec).to(mean)
    rows = torch.cat([directions, mean.unsqueeze(0), at_bos.unsqueeze(0)])
    return replace(patch, delta=PrincipalChange(material.change(), rows.to(delta.W_dec)))


SUBSTITUTES: dict[str, Callable[[Patch, Material], Patch]] = {
    "random_delta": random_delta,
    "shuffled_delta": shuffled_delta,
    "dense_delta": dense_delta,
    "pca_delta": pca_delta,
}
"""By condition, the function that replaces a patch's delta."""

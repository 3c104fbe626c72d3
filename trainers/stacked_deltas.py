"""Several delta transcoders side by side in stacked tensors: initialisation, gradients, and the finished transcoders.

In: a batch (x, residual). Out: the gradients of every replica's loss, in feature space:
`|aW - r|^2 = a(WW')a' - 2a(Wr)' + |r|^2`, so that nothing of size (replicas, tokens, d_out) is created and each
product reads x or the residual once for all replicas.
"""

from __future__ import annotations

from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from models.transcoder import Transcoder
from sites import Site

BANDWIDTH = 0.1
"""Width of the rectangle that replaces the step's derivative (straight-through), in units of pre-activation."""
SMALLEST_SQUARE = 1e-12
"""Squared norm of a decoder row below which the penalty's gradient shrinks to zero with the row, whose direction is not
known yet."""
RIDGE = 0.1
"""Ridge of the regression that initialises the encoders, in units of the mean variance of x."""
STEER = 0.3
"""How far the log of a threshold moves per step, per unit of relative error in L0."""


class Losses(NamedTuple):
    """What a step's losses are computed from, on demand and until the next step: most steps do not need them.

    `on` (n,) counts each replica's active features over `tokens`. The other tensors cover all features: activations,
    the error and the residual projected on the decoder rows, sums of activations, decoder norms.
    """

    tokens: int
    d_out: int
    on: Tensor
    acts: Tensor
    beyond: Tensor
    along: Tensor
    total: Tensor
    norms: Tensor

    @property
    def error(self) -> Tensor:
        """(n,): the mean squared error per dimension minus that of predicting zero; add mean(residual^2) to get the
        mean squared error."""
        return self._by_replica((self.acts * (self.beyond - self.along)).sum(0)) / (self.tokens * self.d_out)

    @property
    def penalty(self) -> Tensor:
        """(n,): the mean over tokens of sum_i acts_i |W_dec_i|."""
        return self._by_replica(self.total * self.norms) / self.tokens

    def _by_replica(self, by_feature: Tensor) -> Tensor:
        return by_feature.view(len(self.on), -1).sum(1)


class Start:
    """A sample of `x` (tokens, d_in) and `residual` (tokens, d_out), fp32, from which deltas start: each feature reads
    a random mixture, drawn with `seed + replica`, of the directions from which ridge regression predicts the residual;
    its bias subtracts the mean of what it reads, and its threshold is an upper quantile of that, so that about
    `l0_budget` features are active on each token.

    The trials of a group start alike, so what they start from is kept.
    """

    def __init__(self, x: Tensor, residual: Tensor) -> None:
        self.x, self.residual = x, residual
        self._known: dict[tuple[float, ...], tuple[Tensor, Tensor, Tensor]] = {}

    def weights(
        self, replicas: int, d_new: int, l0_budget: float, seed: int, times: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """W_enc, b_enc and log_threshold of `times` times `replicas` deltas, the caller's to change."""
        key = (replicas, d_new, l0_budget, seed, times)
        if key not in self._known:
            self._known[key] = self._computed(*key)
        W_enc, b_enc, log_threshold = self._known[key]
        return W_enc.clone(), b_enc.clone(), log_threshold.clone()

    def _computed(
        self, replicas: int, d_new: int, l0_budget: float, seed: int, times: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        x = self.x
        generators = [torch.Generator().manual_seed(seed + index) for index in range(replicas)]
        drawn = [torch.randn(self.residual.shape[1], d_new, generator=generator) for generator in generators] * times
        W_enc = self._predictive(torch.cat(drawn, dim=1).to(x.device))
        pre = x @ W_enc
        b_enc = -pre.mean(0)
        below = max(1, round((1 - min(0.5, l0_budget / d_new)) * len(x)))
        return W_enc, b_enc, (pre + b_enc).kthvalue(below, dim=0).values.clamp(min=1e-2).log()

    @cached_property
    def _ridged(self) -> Tensor:
        """The covariance of x, and the ridge on its diagonal."""
        centred = self.x - self.x.mean(0)
        covariance = centred.T @ centred / len(centred)
        ridge = (RIDGE * covariance.diagonal().mean()).clamp(min=1e-6)
        return covariance + ridge * torch.eye(len(covariance), device=centred.device)

    def _predictive(self, mixtures: Tensor) -> Tensor:
        """`(cov(x) + ridge)^-1 cov(x, residual) mixtures` as unit columns (d_in, n), for `mixtures` (d_out, n). A
        column that would be zero keeps its mixture, padded or cut to d_in."""
        x, residual = self.x, self.residual
        crossed = (x - x.mean(0)).T @ ((residual - residual.mean(0)) @ mixtures) / len(x)
        columns = torch.linalg.solve(self._ridged, crossed)
        drawn = torch.nn.functional.pad(mixtures, (0, 0, 0, len(columns) - len(mixtures)))  # cuts if d_in is smaller
        columns = torch.where(columns.norm(dim=0) > 1e-12, columns, drawn)
        return (columns / columns.norm(dim=0)).contiguous()  # the fused optimiser assumes its gradient's layout


class StackedDeltas:
    """n deltas, `times` times `replicas`: W_enc (d_in, n * d_new), b_enc and log_threshold (n * d_new,), W_dec
    (n, d_new, d_out). The encoders start as `start` says, the decoders at zero."""

    def __init__(self, start: Start, *, replicas: int, d_new: int, l0_budget: float, seed: int, times: int = 1) -> None:
        self.W_enc, self.b_enc, self.log_threshold = start.weights(replicas, d_new, l0_budget, seed, times)
        self.count, self.d_new = times * replicas, d_new
        self.W_dec = self.W_enc.new_zeros(self.count, d_new, start.residual.shape[1])
        self._none = self.W_enc.new_full((self.count,), -1.0)
        """The relative error in L0 where nothing is active."""

    def raw_gradients(self) -> list[Tensor]:
        """The gradients of W_enc, b_enc, log_threshold and W_dec."""
        weights = (self.W_enc, self.b_enc, self.log_threshold, self.W_dec)
        return [weight.grad for weight in weights if weight.grad is not None]

    def gradients(self) -> list[Tensor]:
        """Views of the gradients with the replica as their first dimension."""
        W_enc, b_enc, log_threshold, W_dec = self.raw_gradients()
        by_replica = W_enc.view(len(W_enc), self.count, self.d_new).transpose(0, 1)
        return [by_replica, b_enc.view(self.count, -1), log_threshold.view(self.count, -1), W_dec]

    @torch.no_grad()
    def backward(
        self,
        x: Tensor,
        residual: Tensor,
        sparsity: float | Tensor,
        deviation: float = 1.0,
        of_tokens: int | None = None,
        thresholds: bool = True,
    ) -> Losses:
        """Sets the gradients of every replica's `error + sparsity * penalty`, `residual` in units of `deviation`.
        `sparsity` is one number, or one per feature (n * d_new,). Without `thresholds`, the thresholds' gradients are
        zero.

        `x` (tokens, d_in) and `residual` (tokens, d_out) are fp32 or bf16; products with them are computed in their
        dtype, everything else in fp32. They may be one share of a batch of `of_tokens` tokens: gradients and losses
        then add up over its shares. The threshold's gradient is the straight-through one (arXiv 2407.14435, section 3).
        """
        tokens, d_out = of_tokens or len(x), residual.shape[1]
        per_error = 2.0 / (tokens * d_out)
        threshold = self.log_threshold.exp()
        pre = _product(x, _by_columns(self.W_enc, x.dtype)).add_(self.b_enc)
        # On a CPU as fp32, because each product with a mask would convert it again.
        on = torch.gt(pre, threshold, out=torch.empty_like(pre, dtype=torch.bool if pre.is_cuda else None))
        acts = pre * on
        # The _foreach calls launch one kernel for several tensors.
        rows, sums = torch._foreach_div([self.W_dec.flatten(0, 1), _product(residual.T, acts).T], deviation)  # W, a' r
        along = _product(residual, rows.T)
        apart = self._apart(acts)
        gram = self.W_dec @ self.W_dec.transpose(1, 2)
        squares = gram.diagonal(dim1=1, dim2=2).flatten()
        norms = squares.clamp(min=SMALLEST_SQUARE).sqrt()
        total = acts.sum(0)
        beyond = self._by_replica(torch.baddbmm(self._apart(along), apart, gram, beta=-1))  # W (aW - r)'
        per_token = sparsity / tokens
        pull, push = torch._foreach_mul(
            [total / norms, norms], [per_token] * 2 if isinstance(per_token, Tensor) and per_token.ndim else per_token
        )
        to_acts = torch.add(push, beyond, alpha=per_error)
        expected = apart.transpose(1, 2) @ apart @ self.W_dec  # a' a W
        self.W_dec.grad = (
            expected.sub_(sums.view_as(expected)).mul_(per_error).add_(self.W_dec * pull.view(self.count, -1, 1))
        )

        if thresholds:
            near = (pre > threshold - BANDWIDTH / 2) & (pre < threshold + BANDWIDTH / 2)
            self.log_threshold.grad = (to_acts * near).sum(0) * threshold.square() / -BANDWIDTH
        elif self.log_threshold.grad is None:
            self.log_threshold.grad = torch.zeros_like(self.log_threshold)
        to_pre = to_acts.mul_(on)
        self.b_enc.grad = to_pre.sum(0)
        self.W_enc.grad = _product(x.T, to_pre)

        counts = on.view(len(on), self.count, self.d_new).sum((0, 2), dtype=torch.float32)
        return Losses(tokens, d_out, counts, acts, beyond, along, total, norms)

    @torch.no_grad()
    def steer(self, on: Tensor, target: Tensor) -> None:
        """Moves all thresholds of each replica together, to bring its number of active features in a batch from `on`
        (n,) towards `target` (n,)."""
        error = torch.addcdiv(self._none, on, target).clamp_(max=1).mul_(STEER)
        self.log_threshold.view(self.count, -1).add_(error.unsqueeze(1))

    @torch.no_grad()
    def transcoders(self, deviation: float, site: Site) -> list[Transcoder]:
        """The replicas as transcoders in raw units."""
        columns = [slice(index * self.d_new, (index + 1) * self.d_new) for index in range(self.count)]
        return [
            Transcoder(
                W_enc=self.W_enc[:, chosen].clone(),
                b_enc=self.b_enc[chosen].clone(),
                threshold=self.log_threshold[chosen].exp(),
                W_dec=self.W_dec[index] * deviation,
                b_dec=None,
                site=site,
            )
            for index, chosen in enumerate(columns)
        ]

    def tensors(self) -> dict[str, Tensor]:
        """Everything that training changes, by name."""
        return {name: getattr(self, name) for name in ("W_enc", "b_enc", "log_threshold", "W_dec")}

    def _apart(self, stacked: Tensor) -> Tensor:
        """(tokens, n * d_new) as (n, tokens, d_new)."""
        return stacked.view(len(stacked), self.count, self.d_new).transpose(0, 1)

    def _by_replica(self, apart: Tensor) -> Tensor:
        """The inverse of `_apart`."""
        return apart.transpose(0, 1).reshape(apart.shape[1], -1)


def _product(left: Tensor, right: Tensor) -> Tensor:
    """A product in fp32, computed in bf16 if either side is bf16."""
    if torch.bfloat16 in (left.dtype, right.dtype):
        return (left.bfloat16() @ right.bfloat16()).float()
    return left @ right


def _by_columns(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """`weights` as the right side of a product in `dtype`; bf16 is stored column-major, which a CPU multiplies twice as
    fast."""
    return weights if dtype == torch.float32 else weights.T.contiguous().to(dtype).T

"""Several base transcoders side by side: initialisation, gradients, and the finished transcoders.

In: a batch (x, y) and each transcoder's number of active features per token. Out: the gradients of every transcoder's
squared error. Only a batch's largest activations are kept (BatchTopK, arXiv 2412.06410), about one in a hundred, so
only the encoder's product is dense; decoding and all gradients are sparse products.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from models.transcoder import Transcoder
from sites import Site
from trainers.distributed import ALONE, Processes

THRESHOLD_SAMPLE = 1 << 16
"""Pre-activations sampled to find a batch's cut: its L0 is then right to within a few percent, which does not affect
training; the final threshold is exact."""

warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta state")


class Step(NamedTuple):
    """Each transcoder's mean squared error on a batch (n,), and which features fired (n, width)."""

    losses: Tensor
    fired: Tensor


class StackedBases:
    """n transcoders: W_enc (n, width, d_in), W_dec (n, width, d_out), b_enc (n, width), b_dec (n, d_out).

    They start with unit-norm encoder directions, small random decoder rows, and zero biases, since y is standardised.
    """

    def __init__(self, d_in: int, d_out: int, count: int, width: int, generator: torch.Generator, device: str) -> None:
        W_enc = torch.randn(count, width, d_in, generator=generator)
        W_dec = torch.randn(count, width, d_out, generator=generator) * (0.1 / math.sqrt(d_in))
        self.W_enc = (W_enc / W_enc.norm(dim=2, keepdim=True)).to(device)
        self.W_dec = W_dec.to(device)
        self.b_enc = torch.zeros(count, width, device=device)
        self.b_dec = torch.zeros(count, d_out, device=device)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.W_enc, self.b_enc, self.W_dec, self.b_dec]

    def gradients(self) -> list[Tensor]:
        """The gradients, each with the transcoder as its first dimension."""
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    @torch.no_grad()
    def backward(
        self,
        x: Tensor,
        y: Tensor,
        target_l0: Sequence[float],
        generator: torch.Generator,
        dtype: torch.dtype,
        group: Processes = ALONE,
    ) -> Step:
        """Sets the gradients of every transcoder's mean squared error; `x` and `y` (tokens, d_in and d_out) are fp32.

        The encoder's product is computed in `dtype`, everything else in fp32. Each process of a `group` gets the whole
        batch, computes its share, and ends with the gradients of the whole batch.
        """
        tokens = len(x)
        x, y = group.share(x), group.share(y)
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.empty_like(parameter)
        W_enc, b_enc, W_dec, b_dec = self.gradients()
        x_cast = x.to(dtype)
        losses, fired = [], []
        for index, target in enumerate(target_l0):
            pre = torch.addmm(self.b_enc[index].to(dtype), x_cast, self.W_enc[index].to(dtype).T)
            kind = _Active if has_sparse_products(pre.device.type) else _DenseActive
            active = kind.of(pre, batch_cut(pre, target, generator, group, tokens))
            error = torch.addmm(self.b_dec[index] - y, active.matrix(active.values), self.W_dec[index])
            losses.append(error.square().mean() * (len(x) / tokens))
            fired.append(active.counts)
            error.mul_(2 / (tokens * error.shape[1]))
            to_values = active.sampled(error, self.W_dec[index])
            W_dec[index] = active.transposed(active.values) @ error
            W_enc[index] = active.transposed(to_values) @ x
            b_dec[index] = error.sum(0)
            b_enc[index] = torch.zeros_like(self.b_enc[index]).index_add_(0, active.columns, to_values)
        step = Step(torch.stack(losses), torch.stack(fired))
        group.add_up([*self.gradients(), *step])
        return step._replace(fired=step.fired > 0)

    @torch.no_grad()
    def revive(
        self, fired: Tensor, x: Tensor, y: Tensor, target_l0: Sequence[float], optimiser: Optimizer
    ) -> list[int]:
        """Reinitialises features that fired on no token of the last epoch, pointing them at the worst reconstructed
        tokens of a batch; returns how many per transcoder."""
        counts = []
        for index, target in enumerate(target_l0):
            dead = (~fired[index]).nonzero().squeeze(1)[: len(x)]
            counts.append(len(dead))
            if not len(dead):
                continue
            pre = torch.addmm(self.b_enc[index], x, self.W_enc[index].T)
            cut = batch_cut(pre, target, torch.Generator().manual_seed(0))
            error = y - torch.addmm(self.b_dec[index], torch.where(pre > cut, pre, 0.0), self.W_dec[index])
            worst = error.pow(2).sum(1).topk(len(dead)).indices
            norm = self.W_enc[index].norm(dim=1).mean()
            direction = x[worst] - x.mean(0)
            self.W_enc[index, dead] = direction / direction.norm(dim=1, keepdim=True).clamp(min=1e-6) * norm
            self.b_enc[index, dead] = 0.0
            self.W_dec[index, dead] = error[worst] / x[worst].norm(dim=1, keepdim=True) / norm
            for parameter in (self.W_enc, self.b_enc, self.W_dec):
                for key in ("exp_avg", "exp_avg_sq"):
                    optimiser.state[parameter][key][index, dead] = 0.0
        return counts

    def transcoder(self, index: int, cut: float, mean: Tensor, deviation: float, site: Site) -> Transcoder:
        """Transcoder `index` with threshold `cut`, in raw units: y = standardised y * deviation + mean."""
        return Transcoder(
            W_enc=self.W_enc[index].T.contiguous(),
            b_enc=self.b_enc[index].clone(),
            threshold=torch.full_like(self.b_enc[index], cut),
            W_dec=self.W_dec[index] * deviation,
            b_dec=self.b_dec[index] * deviation + mean,
            site=site,
        )


class _Active(NamedTuple):
    """The activations of a batch above the cut, with their positions, in row order.

    `starts` (tokens + 1,) and `columns` (nnz,) are those of a CSR matrix (tokens, width). `counts` (width,), `order`
    and `rows` (nnz,) give its transpose.
    """

    values: Tensor
    starts: Tensor
    columns: Tensor
    rows: Tensor
    order: Tensor
    counts: Tensor

    @classmethod
    def of(cls, pre: Tensor, cut: Tensor) -> _Active:
        tokens, width = pre.shape
        rows, columns = (pre > cut).nonzero(as_tuple=True)
        order = torch.sort(columns, stable=True).indices
        counts = torch.bincount(columns, minlength=width)
        return cls(
            pre[rows, columns].float(), _starts(torch.bincount(rows, minlength=tokens)), columns, rows, order, counts
        )

    def matrix(self, values: Tensor) -> Tensor:
        """`values` as a sparse (tokens, width) matrix."""
        size = (len(self.starts) - 1, len(self.counts))
        return torch.sparse_csr_tensor(self.starts, self.columns, values, size, check_invariants=False)

    def transposed(self, values: Tensor) -> Tensor:
        """`values` as a sparse (width, tokens) matrix."""
        size = (len(self.counts), len(self.starts) - 1)
        rows, values = self.rows[self.order], values[self.order]
        return torch.sparse_csr_tensor(_starts(self.counts), rows, values, size, check_invariants=False)

    def sampled(self, left: Tensor, right: Tensor) -> Tensor:
        """`left @ right.T` (tokens, width) where there is an activation: (nnz,)."""
        blank = self.matrix(torch.zeros_like(self.values))
        return torch.sparse.sampled_addmm(blank, left, right.T, beta=0.0).values()


class _DenseActive(_Active):
    """`_Active` for devices without sparse products: uses dense ones, with all the zeros."""

    def matrix(self, values: Tensor) -> Tensor:
        dense = values.new_zeros(len(self.starts) - 1, len(self.counts))
        dense[self.rows, self.columns] = values
        return dense

    def transposed(self, values: Tensor) -> Tensor:
        return self.matrix(values).T

    def sampled(self, left: Tensor, right: Tensor) -> Tensor:
        return (left @ right.T)[self.rows, self.columns]


@lru_cache
def has_sparse_products(device: str) -> bool:
    """Whether torch has the fp32 sparse products that a step needs on this type of device."""
    indices = torch.tensor([0, 1], device=device), torch.tensor([0], device=device)
    try:
        sparse = torch.sparse_csr_tensor(*indices, torch.ones(1, device=device), (1, 1), check_invariants=False)
        dense = torch.ones(1, 1, device=device)
        torch.addmm(dense, sparse, dense)
        torch.sparse.sampled_addmm(sparse, dense, dense)
    except RuntimeError:  # includes NotImplementedError
        return False
    return True


def _starts(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def batch_cut(
    pre: Tensor, target: float, generator: torch.Generator, group: Processes = ALONE, of_tokens: int | None = None
) -> Tensor:
    """The value that about `target` positive pre-activations per token exceed, estimated from a random sample of the
    batch. `pre` is this process's share of the batch's `of_tokens` rows."""
    flat, width = pre.flatten(), pre.shape[1]
    count = (of_tokens or len(pre)) * width
    chosen = None
    if count > THRESHOLD_SAMPLE:
        chosen = torch.randint(count, (THRESHOLD_SAMPLE,), generator=generator).to(flat.device)
    if group.count > 1:
        chosen = torch.arange(count, device=flat.device) if chosen is None else chosen
        flat = _sample(flat.float(), chosen - group.first(count // width) * width, group)
    elif chosen is not None:
        flat = flat[chosen]
    n_active = round(len(flat) * target / width)
    return flat.float().kthvalue(max(1, len(flat) - n_active)).values.clamp(min=0.0).to(pre.dtype)


def _sample(flat: Tensor, chosen: Tensor, group: Processes) -> Tensor:
    """The values at `chosen`, indices relative to this process's first value; those out of range are on other
    processes."""
    inside = (chosen >= 0) & (chosen < len(flat))
    values = torch.where(inside, flat[chosen.clamp(0, len(flat) - 1)], 0.0)
    group.add_up([values])
    return values

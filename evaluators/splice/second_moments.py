"""Second moments of what a delta is trained on, and the linear maps and directions that follow from them.

In: batches of pairs of x and what is to be explained there, (tokens, d) each. Out: their `Moments`; one pass over the
pairs serves every rank, subset and control.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

RIDGE = 1e-6
"""Ridge in units of the mean squared input, so that the regression has a solution if inputs are degenerate."""


class Moments(NamedTuple):
    """Sums over the tokens of pairs (x, y), in fp64 on the CPU: `inputs` of x x^T (d_in, d_in), `products` of x y^T
    (d_in, d_out), `outputs` of y y^T (d_out, d_out), `total` of y (d_out,), and `tokens` (), how many there are."""

    inputs: Tensor
    products: Tensor
    outputs: Tensor
    total: Tensor
    tokens: Tensor

    @classmethod
    def of(cls, pairs: Iterable[tuple[Tensor, Tensor]]) -> Moments:
        """Moments of batches of x (tokens, d_in) and y (tokens, d_out), on any device. Raises ValueError for none."""
        moments: Moments | None = None
        for x, y in pairs:
            x, y = x.double(), y.double()
            sums = ((x.T @ x).cpu(), (x.T @ y).cpu(), (y.T @ y).cpu(), y.sum(0).cpu(), torch.tensor(len(x)))
            moments = cls(*(sums if moments is None else (old + new for old, new in zip(moments, sums, strict=True))))
        if moments is None:
            raise ValueError("moments need at least one pair")
        return moments


def reduced_rank_regression(moments: Moments, rank: int) -> tuple[Tensor, Tensor]:
    """`encoder` (d_in, rank) and `decoder` (rank, d_out), fp64 on the CPU, that minimise the squared norm of
    `x @ encoder @ decoder - y` over the pairs.

    This is the least-squares map projected on the leading directions of its fitted values (Izenman 1975).
    """
    ridge = RIDGE * moments.inputs.diagonal().mean() * torch.eye(len(moments.inputs), dtype=torch.float64)
    least_squares = torch.linalg.solve(moments.inputs + ridge, moments.products)
    _, directions = torch.linalg.eigh(moments.products.T @ least_squares)  # ascending
    leading = directions[:, -rank:]
    return least_squares @ leading, leading.T.contiguous()


def principal_directions(moments: Moments, count: int) -> tuple[Tensor, Tensor]:
    """The mean (d_out,) of y and its `count` leading principal directions (min(count, d_out), d_out), orthonormal, the
    largest last, in fp64 on the CPU."""
    mean = moments.total / moments.tokens
    _, directions = torch.linalg.eigh(moments.outputs / moments.tokens - torch.outer(mean, mean))  # ascending
    return mean, directions[:, -count:].T.contiguous()

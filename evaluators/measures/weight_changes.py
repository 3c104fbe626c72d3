"""What finetuning changed in the weights: each tensor's relative size and numerical rank, and the rows of embeddings.

In: readers of two models' tensors, by transformers' names. Out: one `WeightChange` per tensor that differs. Two tensors
are in memory at a time.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

HIGHEST_RANK = 64
"""Highest rank that is determined. LoRA's are rarely higher, and a full SVD of every matrix takes minutes."""
SPARE = 16
"""Extra directions of a random sketch, which make it find the leading ones almost surely (Halko et al. 2011)."""
SKETCHES = (16 + SPARE, HIGHEST_RANK + SPARE)
"""Widths of sketches that are tried one after the other: most LoRAs have a rank of 16 or less."""
ROWS_SHOWN = 20

Reader = Callable[[str], Tensor]
"""Reads a tensor by its name."""


class WeightChange(NamedTuple):
    """A tensor that finetuning changed.

    `module` is the last part of its module's name, such as `q_proj`, and `layer` the number in it. `relative` is
    |W' - W| / |W| in Frobenius norm. `rank` is the numerical rank of W' - W, the number of singular values above what
    rounding to the dtype of W' explains; None for vectors, and where it is above `HIGHEST_RANK`.
    """

    name: str
    module: str
    layer: int | None
    shape: tuple[int, ...]
    relative: float
    rank: int | None

    @property
    def rank_in_words(self) -> str:
        if len(self.shape) < 2:
            return "-"
        return f"more than {HIGHEST_RANK}" if self.rank is None else str(self.rank)


class RowChange(NamedTuple):
    """A row of an embedding matrix: its number (a token id) and |row' - row| / |row|."""

    row: int
    relative: float


def weight_changes(names: Iterable[str], before: Reader, after: Reader) -> list[WeightChange]:
    """The tensors among `names` that differ between two models, in the order given. A tensor that is stored in a
    coarser dtype after finetuning is compared with the first model's, rounded the same way."""
    changes = []
    for name in names:
        new = after(name)
        old = before(name).to(new)
        if torch.equal(old, new):
            continue
        difference = new.float() - old.float()
        module = re.sub(r"\.(weight|bias)$", "", name)
        number = re.search(r"\.(\d+)\.", module)
        changes.append(
            WeightChange(
                name,
                module.rpartition(".")[2] + (" (bias)" if name.endswith(".bias") else ""),
                int(number[1]) if number else None,
                tuple(new.shape),
                (difference.norm() / old.float().norm().clamp(min=1e-30)).item(),
                numerical_rank(difference, rounding_of(new)) if new.dim() == 2 else None,
            )
        )
    return changes


def rounding_of(weights: Tensor) -> float:
    """A bound on the root mean square of the error of a difference of `weights` that were computed and stored in their
    dtype."""
    return weights.float().pow(2).mean().sqrt().item() * torch.finfo(weights.dtype).eps


def numerical_rank(difference: Tensor, noise: float) -> int | None:
    """The number of singular values of a matrix that stand above those of random entries with root mean square `noise`,
    whose largest is about noise (sqrt(m) + sqrt(n)), by a factor of 2; None if there are more than `HIGHEST_RANK`.

    A matrix that is too large for a full decomposition is projected on a random sketch of its range first; what the
    sketch misses must be noise too, or the rank is higher.
    """
    matrix = difference.float()
    rows, columns = matrix.shape
    tolerance = 2 * noise * (math.sqrt(rows) + math.sqrt(columns))
    if min(rows, columns) <= 2 * SKETCHES[-1]:
        rank = int((torch.linalg.svdvals(matrix) > tolerance).sum())
        return rank if rank <= HIGHEST_RANK else None
    for width in SKETCHES:
        generator = torch.Generator().manual_seed(0)
        sketch = matrix @ torch.randn(columns, width, generator=generator).to(matrix)
        range_found, _ = torch.linalg.qr(sketch)
        projected = range_found.T @ matrix
        residual = (matrix - range_found @ projected).norm().item()
        squares = torch.linalg.eigvalsh(projected.double() @ projected.double().T)  # of singular values
        rank = int((squares > tolerance**2).sum())
        # Noise alone would leave noise sqrt(m n); a rounded change leaves singular values of at most `tolerance`.
        if rank <= width - SPARE and residual <= tolerance * math.sqrt(min(rows, columns)):
            return rank
    return None


def row_changes(before: Tensor, after: Tensor, most: int = ROWS_SHOWN) -> tuple[int, list[RowChange]]:
    """The number of rows of an embedding matrix that changed, and those that changed most, relative to their norm."""
    old = before.to(after).float()
    relative = (after.float() - old).norm(dim=1) / old.norm(dim=1).clamp(min=1e-30)
    values, places = relative.topk(min(most, len(relative)))
    changed = [RowChange(int(place), float(value)) for place, value in zip(places, values, strict=True) if value > 0]
    return int((relative > 0).sum()), changed

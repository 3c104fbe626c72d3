"""Training rows as tokens, shuffled batches of them, and batches laid out without padding.

In: rows and a tokenizer. Out: `Example`s, an endless stream of batches, and `Packed` batches: the tokens of all rows
except each row's last one, which predicts nothing, and indices that arrange them as rows for attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from data.encoding import encode_row
from data.rows import Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Example(NamedTuple):
    """A row as tokens, and how many of its last tokens count towards the loss."""

    ids: list[int]
    labelled: int


def example(tokenizer: PreTrainedTokenizerBase, row: Row, loss_on: str = "target") -> Example:
    """A row's tokens. The loss is on its target or, with `everything` and a target that repeats the input, on the whole
    row but BOS."""
    encoded = encode_row(tokenizer, row)
    everything = loss_on == "everything" and row.target == row.input
    return Example(encoded.ids, len(encoded.ids) - 1 if everything else len(encoded.target))


def shuffled_batches(rows: Sequence[Example], size: int, seed: int) -> Iterator[list[Example]]:
    """Endless batches, reshuffled every epoch; the same seed gives the same batches.

    Rows are not grouped by length: only attention is padded anyway, and with two kinds of rows of different lengths,
    grouping put a single kind in nearly every batch and raised the validation loss by half.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        for chosen in torch.randperm(len(rows), generator=generator).split(size):
            yield [rows[index] for index in chosen.tolist()]


class Packed(NamedTuple):
    """Rows without padding and without their last token. ids, positions: (tokens,), positions count from a row's BOS.

    rows: (row, longest), the token index at each place of a padded row; a short row's last token is repeated after its
    end. places: (tokens,), the index of each token in the flattened `rows`. scored: (labelled,), indices of the tokens
    whose successor counts towards the loss, row after row; labels: those successors.
    """

    ids: Tensor
    positions: Tensor
    rows: Tensor
    places: Tensor
    scored: Tensor
    labels: Tensor

    def to(self, device: str | torch.device) -> Packed:
        return Packed(*(tensor.to(device) for tensor in self))


def pack(rows: Sequence[Example]) -> Packed:
    """Concatenates rows. Raises ValueError if there are no rows, or one has fewer than two tokens."""
    if not rows or min(len(row.ids) for row in rows) < 2:
        raise ValueError("a batch needs at least one row, and a row at least two tokens")
    lengths = torch.tensor([len(row.ids) - 1 for row in rows])
    counts = torch.tensor([row.labelled for row in rows])
    starts = lengths.cumsum(0) - lengths
    columns = torch.arange(int(lengths.max()))
    row_of = torch.repeat_interleave(torch.arange(len(rows)), lengths)
    positions = torch.arange(len(row_of)) - starts[row_of]
    return Packed(
        ids=torch.tensor([token for row in rows for token in row.ids[:-1]]),
        positions=positions,
        rows=starts[:, None] + torch.minimum(columns, lengths[:, None] - 1),
        places=row_of * len(columns) + positions,
        scored=(positions >= (lengths - counts)[row_of]).nonzero().squeeze(1),
        labels=torch.tensor([token for row in rows for token in row.ids[len(row.ids) - row.labelled :]]),
    )

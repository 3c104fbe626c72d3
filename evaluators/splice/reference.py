"""What the raw model predicts at the target tokens of rows: the reference of a KL divergence.

In: a TransformerBridge with nothing spliced, and rows. Out: KL(raw || spliced) for logits of the same tokens. What is
kept of a row is the residual stream at its targets; the probabilities follow from it and stay as long as memory allows.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from data.encoding import Encoded, pad_left
from evaluators.splice.passes import project, resume
from models.bridge import device_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

HELD_BYTES = 1 << 30
"""Memory for the probabilities that are kept."""


class Predicted(NamedTuple):
    """Raw's next-token probabilities p (token, vocabulary) at a row's targets, and sum(p log p) of each (token,)."""

    probabilities: Tensor
    negative_entropy: Tensor


class Reference:
    """Raw's predictions at the targets of the rows it was told of.

    A scoring pass of the raw model hands over what it computes (`keep`); for other rows `add` runs one, which must
    happen while nothing is spliced and no weights are exchanged. Both put rows of similar length together, so either
    gives the same bits.
    """

    def __init__(self, bridge: TransformerBridge, batch_size: int = 32) -> None:
        self.bridge, self.batch_size = bridge, batch_size
        self._streams: dict[tuple[int, ...], Tensor] = {}
        self._held: OrderedDict[tuple[int, ...], Predicted] = OrderedDict()
        self._bytes = 0

    @torch.inference_mode()
    def add(self, rows: Sequence[Encoded]) -> None:
        """Runs the raw model on rows that are new."""
        missing = {tuple(row.ids): row for row in rows if tuple(row.ids) not in self._streams}
        ordered = [missing[ids] for ids in sorted(missing, key=lambda ids: (len(ids), ids))]
        for start in range(0, len(ordered), self.batch_size):
            chosen = ordered[start : start + self.batch_size]
            batch = pad_left([row.ids for row in chosen], self.bridge.tokenizer.pad_token_id)
            self.keep(chosen, resume(self.bridge, batch.to(device_of(self.bridge))))

    def keep(self, rows: Sequence[Encoded], streams: Tensor) -> None:
        """Takes what leaves raw's last block (row, position, d_model) on rows padded on the left."""
        for row, stream in zip(rows, streams, strict=True):
            self._streams[tuple(row.ids)] = stream[-len(row.target) - 1 : -1].clone()

    def divergence(self, rows: Sequence[Encoded]) -> Divergence:
        """What takes the logits of the targets of `rows`, one row after the other."""
        return Divergence(self, rows)

    def predicted(self, row: Encoded) -> Predicted:
        key = tuple(row.ids)
        if key in self._held:
            self._held.move_to_end(key)
            return self._held[key]
        log = torch.cat([logits.log_softmax(-1) for logits in project(self.bridge, self._streams[key])])
        found = Predicted(log.exp(), (log.exp() * log).sum(-1))
        self._held[key] = found
        self._bytes += found.probabilities.nbytes
        while self._bytes > HELD_BYTES and len(self._held) > 1:
            _, gone = self._held.popitem(last=False)
            self._bytes -= gone.probabilities.nbytes
        return found


class Divergence:
    """KL(raw || spliced) of rows, from chunks of logits as they are made."""

    def __init__(self, reference: Reference, rows: Sequence[Encoded]) -> None:
        self._reference, self._rows = reference, rows
        self._sums = [0.0] * len(rows)
        self._row = self._at = 0

    def take(self, logits: Tensor, total: Tensor) -> None:
        """The next chunk, (token, vocabulary), and log sum exp of each token's logits (token,)."""
        first = 0
        while first < len(logits):
            row = self._rows[self._row]
            count = min(len(row.target) - self._at, len(logits) - first)
            raw = self._reference.predicted(row)
            ours, theirs = slice(first, first + count), slice(self._at, self._at + count)
            # sum p (log p - log q) = sum p log p - sum p logits + log sum exp(logits)
            expected = torch.linalg.vecdot(raw.probabilities[theirs], logits[ours])
            self._sums[self._row] += (raw.negative_entropy[theirs] - expected + total[ours]).double().sum().item()
            first, self._at = first + count, self._at + count
            if self._at == len(row.target):
                self._row, self._at = self._row + 1, 0

    def of_row(self, place: int) -> float:
        """Nats, summed over the row's targets; rounding does not take it below zero."""
        return max(0.0, self._sums[place])

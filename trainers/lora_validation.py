"""How well an adapted model does on held-out rows, measured in one teacher-forced pass.

In: a forward pass and encoded rows. Out: the loss, and how well the first token tells requests from other rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from data.encoding import Encoded
from trainers.adapters import Forward
from trainers.fused import cross_entropy_sum
from trainers.packing import Example, pack


@torch.no_grad()
def validation_counts(
    forward: Forward, rows: Sequence[Encoded], call_token: int, device: torch.device | str, batch_size: int = 16
) -> torch.Tensor:
    """Sums over `rows` (fp64): nats, target tokens, rows called, requests, requests called.

    A request is a row whose target starts with `call_token`; a row is called if that token is the first one's argmax.
    """
    sums = torch.zeros(5, dtype=torch.float64)
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        batch = pack([Example(row.ids, len(row.target)) for row in chunk]).to(device)
        logits = forward(batch)
        lengths = torch.tensor([len(row.target) for row in chunk])
        firsts = lengths.cumsum(0) - lengths
        called = logits[firsts.to(device)].argmax(-1).cpu() == call_token
        wanted = torch.tensor([row.target[0] == call_token for row in chunk])
        nats = cross_entropy_sum(logits, batch.labels).item()
        sums += torch.tensor(
            [nats, lengths.sum(), called.sum(), wanted.sum(), (called & wanted).sum()], dtype=torch.float64
        )
    return sums


def figures_of(sums: torch.Tensor) -> dict[str, float]:
    """From those sums, `val_loss` in nats per target token, and precision, recall and F1 of the first token."""
    nats, tokens, called, wanted, both = sums.tolist()
    precision = both / called if called else 0.0
    recall = both / wanted if wanted else 0.0
    return {
        "val_loss": nats / max(tokens, 1.0),
        "tool_call_precision": precision,
        "tool_call_recall": recall,
        "tool_call_f1": 2 * precision * recall / (precision + recall) if both else 0.0,
    }

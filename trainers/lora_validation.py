"""How well an adapted model does on held-out rows, measured in one teacher-forced pass.

In: a forward pass and encoded rows. Out: the loss, and how often the next token is the right one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from data.encoding import Encoded
from trainers.adapters import Forward
from trainers.lora_forward import cross_entropy_sum
from trainers.packing import Example, pack


@torch.no_grad()
def validation_counts(
    forward: Forward, rows: Sequence[Encoded], device: torch.device | str, batch_size: int = 16
) -> torch.Tensor:
    """Sums over `rows` (fp64): nats, target tokens, those that are the argmax, rows, rows whose first token is it."""
    sums = torch.zeros(5, dtype=torch.float64)
    ordered = sorted(rows, key=lambda row: len(row.ids))
    for start in range(0, len(ordered), batch_size):
        chunk = ordered[start : start + batch_size]
        batch = pack([Example(row.ids, len(row.target)) for row in chunk]).to(device)
        logits = forward(batch)
        lengths = torch.tensor([len(row.target) for row in chunk])
        firsts = lengths.cumsum(0) - lengths
        wanted = torch.tensor([token for row in chunk for token in row.target])
        right = logits.argmax(-1).cpu() == wanted
        nats = cross_entropy_sum(logits, batch.labels).item()
        sums += torch.tensor([nats, lengths.sum(), right.sum(), len(chunk), right[firsts].sum()], dtype=torch.float64)
    return sums


def figures_of(sums: torch.Tensor) -> dict[str, float]:
    """From those sums, `val_loss` in nats per target token, `token_accuracy`, and `first_token_accuracy`, which tells
    kinds of answers apart."""
    nats, tokens, right, rows, first = sums.tolist()
    return {
        "val_loss": nats / max(tokens, 1.0),
        "token_accuracy": right / max(tokens, 1.0),
        "first_token_accuracy": first / max(rows, 1.0),
    }

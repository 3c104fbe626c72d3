"""What a trainer raises when it cannot continue.

In: what went wrong, such as a loss or an out-of-memory error. Out: an error with a one-sentence message, which a trial
records as its reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class TrainingError(RuntimeError):
    """A run that cannot start or continue."""


class DivergedError(TrainingError):
    """A run whose loss is not finite, or far worse than doing nothing."""


@contextmanager
def memory_error_named(batch_size: int, accumulate: int) -> Iterator[None]:
    """Turns an out-of-memory error into a TrainingError that says what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in text:
            raise
        raise TrainingError(
            f"out of memory with batch_size {batch_size}, accumulate {accumulate}: raise lora.accumulate, set "
            "lora.gradient_checkpointing=true, or use fewer rows per batch; finished trials are then run again, too "
            f"({' '.join(text.split())[:120]})"
        ) from None

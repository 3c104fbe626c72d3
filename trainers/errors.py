"""What a trainer raises when it cannot go on; the message is one sentence that a trial records as its reason."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class TrainingError(RuntimeError):
    """A run that cannot start or go on."""


class DivergedError(TrainingError):
    """A run whose loss is not finite, or far worse than doing nothing."""


@contextmanager
def memory_error_named(batch_size: int, accumulate: int) -> Iterator[None]:
    """Turns an error about memory into a TrainingError that says what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = str(error)
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in text:
            raise
        raise TrainingError(
            f"memory ran out with batch_size {batch_size}, accumulate {accumulate}: raise lora.accumulate, set "
            f"lora.gradient_checkpointing=true, or take fewer rows a batch ({' '.join(text.split())[:120]})"
        ) from None

"""Work in slices, each as large as memory allows.

In: items, a size, and what to do with a slice. Out: everything done; a slice that does not fit is halved, and so are
those after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

Item = TypeVar("Item")


def in_slices(items: Sequence[Item], size: int, run: Callable[[Sequence[Item]], None]) -> None:
    """Calls `run` on consecutive slices of at most `size` items.

    Where memory runs out, the same items are tried again in halves; `run` must bear being repeated. Raises what `run`
    raises where a single item does not fit, and every error that is not about memory.
    """
    start = 0
    while start < len(items):
        chosen = items[start : start + size]
        try:
            run(chosen)
        except (RuntimeError, MemoryError) as error:
            if len(chosen) == 1 or not _out_of_memory(error):
                raise
            size = len(chosen) // 2
        else:
            start += len(chosen)
            continue
        # Outside the handler, where the failed slice's tensors are free again.
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU (whose allocator raises a plain RuntimeError)."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "not enough memory" in str(error) or "can't allocate memory" in str(error)

"""What workers keep in memory between tasks: the last model, wrapped for TransformerLens.

In: a model folder, a device and a precision. Out: a TransformerBridge; a second request for the same one is free.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@lru_cache(maxsize=1)
def bridge(folder: str, device: str, precision: str) -> TransformerBridge:
    """`precision` is fp32 or bf16, already resolved."""
    from models.bridge import wrap
    from models.sources import load_model
    from trainers.precision import dtype_of

    return wrap(*load_model(Path(folder), dtype_of(precision), device))

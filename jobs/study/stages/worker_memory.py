"""What workers keep in memory between tasks: the last model, wrapped for TransformerLens, and its last prefixes.

In: a model folder, a device and a precision. Out: a TransformerBridge, and what it computes up to the end of a layer;
asking for the same one again is free.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.study.stages.work import ModelSpec

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from evaluators.splice.passes import Prefixes


@lru_cache(maxsize=1)
def bridge(folder: str, device: str, precision: str) -> TransformerBridge:
    """`precision` is fp32 or bf16, already resolved."""
    from models.bridge import wrap
    from models.sources import load_model
    from trainers.precision import dtype_of

    # One model at a time: everything of the last one is dropped before the next one is loaded.
    prefixes.cache_clear()
    bridge.cache_clear()
    return wrap(*load_model(Path(folder), dtype_of(precision), device))


@lru_cache(maxsize=1)
def prefixes(model: ModelSpec, layer: int) -> Prefixes:
    """The prefixes of the unedited model at one layer."""
    from evaluators.splice.passes import Prefixes
    from models.transcoder import CONVENTIONS

    loaded = bridge(model.folder, model.device, model.precision)
    return Prefixes(loaded, [layer], CONVENTIONS[model.convention])

"""What workers cache between tasks: the last model, wrapped for TransformerLens, and its last prefixes.

In: a model folder, a device and a precision. Out: a TransformerBridge, and what it computes up to the end of a layer;
repeated calls are free.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from sites import Site

if TYPE_CHECKING:
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    from evaluators.splice.passes import Prefixes
    from evaluators.splice.teacher_forcing import Reference
    from models.blocks import BlockPath


class ModelSpec(NamedTuple):
    """A model folder, and how a worker loads it."""

    folder: str
    device: str
    precision: str


@lru_cache(maxsize=1)
def bridge(folder: str, device: str, precision: str) -> TransformerBridge:
    """`precision` is fp32 or bf16, already resolved."""
    from models.bridge import wrap
    from models.sources import load_model
    from trainers.precision import dtype_of

    # One model at a time: the last one's caches are dropped before the next is loaded.
    prefixes.cache_clear()
    paths.cache_clear()
    exact_paths.cache_clear()
    reference.cache_clear()
    bridge.cache_clear()
    return wrap(*load_model(Path(folder), dtype_of(precision), device))


@lru_cache(maxsize=2)
def paths(model: ModelSpec, folder: str, sites: tuple[Site, ...]) -> dict[Site, BlockPath]:
    """The paths of another folder's model, in the loaded model's dtype."""
    return own_paths(model, folder, sites)


@lru_cache(maxsize=2)
def exact_paths(model: ModelSpec, folder: str, sites: tuple[Site, ...]) -> dict[Site, BlockPath]:
    """Like `paths`, in fp32, because a change is a small difference of two outputs."""
    import torch

    return own_paths(model, folder, sites, torch.float32)


def own_paths(
    model: ModelSpec, folder: str, sites: tuple[Site, ...], dtype: torch.dtype | None = None
) -> dict[Site, BlockPath]:
    """Like `paths`, but not cached: during an exchange of weights, the cached paths hold the model's own."""
    from models.blocks import read_paths

    return read_paths(bridge(model.folder, model.device, model.precision), Path(folder), sites, dtype)


@lru_cache(maxsize=1)
def reference(model: ModelSpec, rows: str, batch_size: int) -> Reference:
    """The raw model's predictions for the rows of a file."""
    from evaluators.splice.teacher_forcing import Reference

    return Reference(bridge(model.folder, model.device, model.precision), batch_size)


@lru_cache(maxsize=1)
def prefixes(model: ModelSpec, site: Site) -> Prefixes:
    """The prefixes of the unedited model at one site."""
    from evaluators.splice.passes import Prefixes

    return Prefixes(bridge(model.folder, model.device, model.precision), [site])

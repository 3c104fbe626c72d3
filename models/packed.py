"""A model's linear layers on a CPU, computed from weights in the order in which oneDNN reads them.

In: a model, or parts of one, in fp32. Out: its linear layers give the same products, rounded differently in the last
bits, and faster: many rows at once, always; the few rows of a step of decoding, inside `packed`. How much faster
depends on the CPU (`benchmarks.packed_products`). Weights may change at any time: a copy belongs to the memory of one
weight as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional

MOST_BYTES = 5 * 2**29
"""A model whose linear weights have more bytes than this is left as it is, since the copies take as much memory."""
PAYS_AT = 128
"""Rows from which a product pays for copying its weight, even if the weight is used once. It depends on nothing else,
so that the same rows always give the same bits."""
ROWS = 16
"""Number of rows for which oneDNN chooses the order of the weights; it serves other numbers as well."""

_FEW_ROWS: ContextVar[bool] = ContextVar("few_rows", default=False)
"""Whether products of few rows use copies too."""


class _Place(NamedTuple):
    """Where a weight is in memory."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Copy(NamedTuple):
    """A weight in oneDNN's order, and which weight it was made from."""

    storage: StorageWeakRef
    version: int
    weight: Tensor


_COPIES: dict[_Place, _Copy] = {}


class PackedLinear(nn.Linear):
    """A linear layer that computes by oneDNN where that pays, and no gradient is needed."""

    def forward(self, input: Tensor) -> Tensor:
        rows = input.numel() // self.in_features
        if torch.is_grad_enabled() or not _is_fp32_on_cpu(self.weight) or not (rows >= PAYS_AT or _FEW_ROWS.get()):
            return functional.linear(input, self.weight, self.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, _copy_of(self.weight), self.bias, "none", [], "")
        return product


def pack(*modules: nn.Module) -> None:
    """Makes the linear layers of `modules` ones that compute by oneDNN. Does nothing for a large model, or where torch
    has no oneDNN. Parameters, names and gradients stay as they are."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return
    layers = [layer for module in modules for layer in module.modules() if type(layer) is nn.Linear]
    if sum(layer.weight.nbytes for layer in layers) <= MOST_BYTES:
        for layer in layers:
            layer.__class__ = PackedLinear


def drop_unused() -> None:
    """Frees the copies of weights that are gone, which otherwise stay until the next copy is made."""
    for place in [place for place, copy in _COPIES.items() if copy.storage.expired()]:
        del _COPIES[place]


@contextmanager
def packed() -> Iterator[None]:
    """Inside the `with`, products of few rows compute by oneDNN too. A copy costs about as much as it saves in six
    steps."""
    token = _FEW_ROWS.set(True)
    try:
        yield
    finally:
        _FEW_ROWS.reset(token)


def is_packed(model: nn.Module) -> bool:
    """Whether all copies that the model would use inside `packed` are there already, so that they cost nothing."""
    return all(
        _found(layer.weight) is not None
        for layer in model.modules()
        if isinstance(layer, PackedLinear) and _is_fp32_on_cpu(layer.weight)
    )


def _is_fp32_on_cpu(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def _copy_of(weight: Tensor) -> Tensor:
    found = _found(weight)
    if found is None:
        drop_unused()
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        found = _COPIES[_place(weight)] = _Copy(StorageWeakRef(weight.untyped_storage()), _version(weight), reordered)
    return found.weight


def _found(weight: Tensor) -> _Copy | None:
    """The copy of `weight` as it is now: of the same memory, never freed in between, and not written to."""
    copy = _COPIES.get(_place(weight))
    return None if copy is None or copy.storage.expired() or copy.version != _version(weight) else copy


def _place(weight: Tensor) -> _Place:
    return _Place(weight.data_ptr(), tuple(weight.shape), weight.stride())


def _version(weight: Any) -> int:
    return 0 if weight.is_inference() else weight._version

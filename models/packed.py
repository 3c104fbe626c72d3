"""A model's linear layers on a CPU, computed from weights in the order in which oneDNN reads them.

In: a model, or parts of one, in fp32. Out: its linear layers give the same products, rounded differently in the last
bits, and faster: many rows at once, always; the few rows of a step of decoding, inside `packed`. How much faster
depends on the CPU (`benchmarks.packed_products`). Weights may be exchanged or trained in between: a copy is used only
while the same memory holds the weight, torch has counted no write to it, and some of its numbers are as they were.
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

MOST_BYTES = 2**32
"""Memory for copies, which take as much as their weights. A model with more is left as it is."""
PAYS_AT = 128
"""Rows from which a product pays for copying its weight, even if the weight is used once. For many rows it depends on
nothing else, so that the same rows always give the same bits."""
ROWS = 16
"""Number of rows for which oneDNN chooses the order of the weights; it serves other numbers as well."""
COMPARED = 32
"""Numbers of a weight that are compared with those at the time of its copy. Torch counts most writes, but not those to
`weight.data` (PEFT's merging), nor those of a fused optimiser; both change nearly all numbers."""

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
    some: Tensor
    weight: Tensor
    nbytes: int


_COPIES: dict[_Place, _Copy] = {}


class PackedLinear(nn.Linear):
    """A linear layer that computes by oneDNN where that pays, and no gradient is needed."""

    def forward(self, input: Tensor) -> Tensor:
        if (input.numel() >= PAYS_AT * self.in_features or _FEW_ROWS.get()) and self._can_be_packed(input):
            copy = _copy_of(self.weight)
            if copy is not None:
                product: Tensor = torch.ops.mkldnn._linear_pointwise(input, copy, self.bias, "none", [], "")
                return product
        return functional.linear(input, self.weight, self.bias)

    def _can_be_packed(self, input: Tensor) -> bool:
        return (
            input.dtype == self.weight.dtype == torch.float32
            and input.device.type == self.weight.device.type == "cpu"
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled("cpu")
        )


def pack(*modules: nn.Module) -> None:
    """Lets the fp32 linear layers of `modules` on a CPU compute by oneDNN. Changes nothing for a large model, or where
    torch has no oneDNN. Parameters, names and gradients stay as they are."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return
    layers = [
        layer
        for module in modules
        for layer in module.modules()
        if type(layer) is nn.Linear and layer.weight.dtype == torch.float32 and layer.weight.device.type == "cpu"
    ]
    if sum(layer.weight.nbytes for layer in layers) <= MOST_BYTES:
        for layer in layers:
            layer.__class__ = PackedLinear


def forget() -> None:
    """Frees all copies; those that are needed again are made again."""
    _COPIES.clear()


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
    return all(_found(layer.weight) is not None for layer in model.modules() if isinstance(layer, PackedLinear))


def _copy_of(weight: Tensor) -> Tensor | None:
    """The copy of a weight; None if there is no room for it."""
    found = _found(weight)
    if found is None:
        drop_unused()
        _COPIES.pop(_place(weight), None)
        if sum(copy.nbytes for copy in _COPIES.values()) + weight.nbytes > MOST_BYTES:
            return None
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), ROWS)
        storage = StorageWeakRef(weight.untyped_storage())
        found = _Copy(storage, _version(weight), _some(weight).clone(), reordered, weight.nbytes)
        _COPIES[_place(weight)] = found
    return found.weight


def _found(weight: Tensor) -> _Copy | None:
    """The copy of `weight` as it is now."""
    copy = _COPIES.get(_place(weight))
    if copy is None or copy.storage.expired() or copy.version != _version(weight):
        return None
    return copy if torch.equal(copy.some, _some(weight)) else None


def _some(weight: Tensor) -> Tensor:
    """Numbers from all over a weight."""
    rows, columns = weight.shape
    count = min(rows, columns, COMPARED)
    steps = (rows // count * weight.stride(0) + columns // count * weight.stride(1),)
    return weight.detach().as_strided((count,), steps, weight.storage_offset())


def _place(weight: Tensor) -> _Place:
    return _Place(weight.data_ptr(), tuple(weight.shape), weight.stride())


def _version(weight: Any) -> int:
    return 0 if weight.is_inference() else weight._version  # torch counts no writes to inference tensors

"""A model's linear layers on a CPU, computed from weights in the order in which oneDNN reads them.

In: a model whose weights stay as they are for a while. Out: inside `packed`, its linear layers give the same products,
rounded differently in the last bits. With the few rows of a step of decoding they are faster
(`benchmarks.packed_products`), with hundreds of rows about as fast as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

MOST_BYTES = 2**32
"""A model whose linear weights have more bytes than this is left as it is, since the copies take as much memory."""
ROWS = 16
"""Number of rows for which oneDNN chooses the order of the weights; it serves other numbers as well."""


class _Copy(NamedTuple):
    """A weight in oneDNN's order, and which weight it was made from."""

    storage: StorageWeakRef
    place: tuple[int, tuple[int, ...], int]
    weight: Tensor

    def is_of(self, weight: Tensor) -> bool:
        """Whether it is still the copy of `weight`: the same memory, never freed in between, and not written to."""
        return self.place == _place(weight) and not self.storage.expired()


_COPIES: WeakKeyDictionary[nn.Linear, _Copy] = WeakKeyDictionary()
"""The latest copy of each layer's weight: a pass often runs with the same weights as the one before."""


@contextmanager
def packed(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, the model's fp32 linear layers on a CPU compute by oneDNN. Gradients are not tracked, and no
    weight may change. Does nothing on another device, in another dtype, for a large model, or where torch has no
    oneDNN."""
    layers = _layers(model)
    products = [_product(_copy_of(layer), layer.bias) for layer in layers]
    for layer, product in zip(layers, products, strict=True):
        layer.__dict__["forward"] = product  # assigning an attribute of a module would look for parameters first
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["forward"]


def is_packed(model: nn.Module) -> bool:
    """Whether all copies that `packed` would use are there already, so that it costs nothing."""
    return all((found := _COPIES.get(layer)) is not None and found.is_of(layer.weight) for layer in _layers(model))


def _layers(model: nn.Module) -> list[nn.Linear]:
    """The layers to compute by oneDNN; none where it is not to be had, or the copies would be too large."""
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_reorder_linear_weight"):
        return []
    layers = [module for module in model.modules() if type(module) is nn.Linear and _can_be_packed(module.weight)]
    return layers if sum(layer.weight.nbytes for layer in layers) <= MOST_BYTES else []


def _can_be_packed(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype == torch.float32


def _copy_of(layer: nn.Linear) -> _Copy:
    found = _COPIES.get(layer)
    if found is None or not found.is_of(layer.weight):
        weight: Any = layer.weight.detach()
        reordered = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS)
        found = _COPIES[layer] = _Copy(StorageWeakRef(weight.untyped_storage()), _place(weight), reordered)
    return found


def _product(copy: _Copy, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    def product(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, copy.weight, bias, "none", [], "")

    return product


def _place(weight: Tensor) -> tuple[int, tuple[int, ...], int]:
    version = 0 if weight.is_inference() else weight._version
    return weight.data_ptr(), tuple(weight.shape), version

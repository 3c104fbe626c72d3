"""A step recorded as a CUDA graph: one launch starts all its kernels, each of which takes longer to launch than to run.

In: a function of tensors that reads and writes other tensors in place, always the same ones, and never waits for the
device. Out: the same function, which on a GPU replays its recorded kernels.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class Graphed(Generic[T]):
    """`function(*inputs)`: run eagerly `first` times, once at least since libraries initialise then, recorded at the
    next call, and replayed from then on. Inputs of another shape are run eagerly, and all of them if it cannot be
    recorded (`refused`), because it waits for the device, for example. The result is valid until the next call.
    """

    def __init__(self, function: Callable[..., T], first: int = 1) -> None:
        self.function, self.first = function, first
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.called = 0
        self.refused = False

    def __call__(self, *inputs: Tensor) -> T:
        if self.refused or not all(tensor.is_cuda for tensor in inputs):
            return self.function(*inputs)
        self.called += 1
        if self.called <= self.first:
            self.inputs = self.inputs or [torch.empty_like(tensor) for tensor in inputs]
            return self.function(*inputs)
        pairs = list(zip(inputs, self.inputs, strict=True))
        if any(tensor.shape != static.shape or tensor.dtype != static.dtype for tensor, static in pairs):
            return self.function(*inputs)
        for new, static in pairs:
            static.copy_(new)
        if self.graph is None:
            graph = torch.cuda.CUDAGraph()
            try:
                with _nothing_collected(), torch.cuda.graph(graph):  # records only, runs nothing
                    self.result = self.function(*self.inputs)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                self.refused = True
                logging.getLogger(__name__).warning("a step runs as it is, not as a CUDA graph: %s", error)
                return self.function(*inputs)
            self.graph = graph
        self.graph.replay()
        return self.result


@contextmanager
def _nothing_collected() -> Iterator[None]:
    """Garbage collection would break the recording if it freed another graph meanwhile."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()

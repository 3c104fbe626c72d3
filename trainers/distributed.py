"""Several processes that train one model: each takes its share of every batch, and all get the sums over the whole.

In: a batch, and sums over a share of it. Out: the share, and the sums over the whole batch. The processes are those of
`accelerate launch` or of a Ray Train job; a single process imports and waits for nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """This process is number `index` of `count`."""

    index: int = 0
    count: int = 1

    def share(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch, about as many as the others'."""
        return batch[self.first(len(batch)) : self.first(len(batch), 1)] if self.count > 1 else batch

    def first(self, rows: int, later: int = 0) -> int:
        """First of `rows` rows assigned to this process, or to the one `later` places after it."""
        return rows * (self.index + later) // self.count

    @torch.no_grad()
    def add_up(self, sums: Sequence[Tensor]) -> None:
        """Sums each of these tensors over all processes, in place."""
        if self.count > 1:
            for tensor in sums:
                torch.distributed.all_reduce(tensor)


ALONE = Processes()


def processes(device: str) -> Processes:
    """The group that this process belongs to, connected by Accelerate. Call this before using `cuda`, as it makes
    `cuda` this process's own device."""
    # A job script may set WORLD_SIZE for something else; a launcher sets all three.
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not {"RANK", "LOCAL_RANK"} <= set(os.environ):
        return ALONE
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device == "cpu")
    if accelerator.device.type == "cuda":
        torch.cuda.set_device(accelerator.device)
    return Processes(accelerator.process_index, accelerator.num_processes)

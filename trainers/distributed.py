"""Several processes that train one model: each takes its share of every batch, and all get the sums over the whole.

In: a batch, and sums over a share of it. Out: the share, and the sums over the whole batch. The processes are those of
`accelerate launch` or of a Ray Train job; one alone imports and waits for nothing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Processes:
    """`index` of `count`."""

    index: int = 0
    count: int = 1

    def share(self, batch: Tensor) -> Tensor:
        """This process's rows of a batch, about as many as the others'."""
        return batch[self.first(len(batch)) : self.first(len(batch), 1)] if self.count > 1 else batch

    def first(self, rows: int, later: int = 0) -> int:
        """The first of so many rows that is this process's, or that of one some places later."""
        return rows * (self.index + later) // self.count

    @torch.no_grad()
    def add_up(self, sums: Sequence[Tensor]) -> None:
        """Adds what the other processes have to each of these tensors, in place."""
        if self.count > 1:
            for one in sums:
                torch.distributed.all_reduce(one)


ALONE = Processes()


def processes(device: str) -> Processes:
    """Those that this process is one of, connected by Accelerate; `cuda` is then this process's own device, so ask
    before anything is put there."""
    # A job script may have set the first for something else; a launcher sets all three.
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not {"RANK", "LOCAL_RANK"} <= set(os.environ):
        return ALONE
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=device == "cpu")
    if accelerator.device.type == "cuda":
        torch.cuda.set_device(accelerator.device)
    return Processes(accelerator.process_index, accelerator.num_processes)

"""Shards on their way to a GPU while it computes with others.

In: groups of shards in the host's memory, and a device. Out: the same groups there, one after the other. From pinned
memory the next group is copied on a stream of its own, so that no step waits for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Shard = tuple[Tensor, ...]


def moved(groups: Sequence[Sequence[Shard]], device: str) -> Iterator[list[Shard]]:
    """The groups on `device`, each while the one before is used; at most two of them are there because of this."""
    if not device.startswith("cuda") or all(one.is_cuda for group in groups for shard in group for one in shard):
        yield from ([tuple(one.to(device) for one in shard) for shard in group] for group in groups)
        return
    beside, own = torch.cuda.Stream(device), torch.cuda.current_stream(device)

    def start(group: Sequence[Shard]) -> list[Shard]:
        with torch.cuda.stream(beside):
            return [tuple(one.to(device, non_blocking=True) for one in shard) for shard in group]

    coming = start(groups[0])
    for number in range(len(groups)):
        own.wait_stream(beside)
        here = coming
        for shard in here:
            for one in shard:
                one.record_stream(own)  # else its memory could be given away while a step still reads it
        coming = start(groups[number + 1]) if number + 1 < len(groups) else []
        yield here
        del here


def pinned(shards: Sequence[Shard]) -> list[Shard]:
    """The same in memory that a GPU can read by itself, where half of what is free holds them; else as they are."""
    import psutil

    size = sum(one.nbytes for shard in shards for one in shard)
    if all(one.is_pinned() for shard in shards for one in shard) or size > psutil.virtual_memory().available // 2:
        return list(shards)
    return [tuple(one.pin_memory() for one in shard) for shard in shards]

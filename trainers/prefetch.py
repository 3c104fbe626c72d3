"""Shards on their way to a GPU while it computes with others.

In: groups of shards in the host's memory, and a device. Out: the same groups there, one after the other. From pinned
memory the next group is copied on a stream of its own, so that no step waits for it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Shard = tuple[Tensor, ...]


def moved(groups: Sequence[Sequence[Shard]], device: str) -> Iterator[list[Shard]]:
    """The groups on `device`, the next one on its way while one is used; whoever takes a group drops it when done."""
    if not device.startswith("cuda") or all(one.is_cuda for group in groups for shard in group for one in shard):
        yield from ([tuple(one.to(device) for one in shard) for shard in group] for group in groups)
        return
    beside, own = _stream(device), torch.cuda.current_stream(device)

    def start(group: Sequence[Shard]) -> list[Shard]:
        with torch.cuda.stream(beside):
            return [tuple(one.to(device, non_blocking=True) for one in shard) for shard in group]

    coming = [start(groups[0])]
    for following in [*groups[1:], ()]:
        own.wait_stream(beside)
        for shard in coming[0]:
            for one in shard:
                one.record_stream(own)  # else its memory could be given away while a step still reads it
        coming.append(start(following))
        yield coming.pop(0)


@functools.cache
def _stream(device: str) -> torch.cuda.Stream:
    """One for all epochs: memory that one stream has freed is of no use to another."""
    return torch.cuda.Stream(device)


def pinned(shards: Sequence[Shard]) -> list[Shard]:
    """The same in memory that a GPU can read by itself, if it takes at most a quarter of what is free, as other workers
    may do the same; else, or where the system refuses, as they are."""
    import psutil

    there = [one for shard in shards for one in shard if one.is_cpu and not one.is_pinned()]
    size = sum(1 << (one.nbytes - 1).bit_length() for one in there)  # the allocator's blocks are powers of two
    if size > psutil.virtual_memory().available // 4:
        return list(shards)
    try:
        return [tuple(one.pin_memory() if one.is_cpu else one for one in shard) for shard in shards]
    except RuntimeError:  # more than this user may lock
        return list(shards)

"""Copies shards to a GPU while it computes with others.

In: groups of shards in host memory, and a device. Out: the same groups on the device, one after the other. From pinned
memory, the next group is copied on a separate stream, so that no step waits for it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Shard = tuple[Tensor, ...]


def moved(groups: Sequence[Sequence[Shard]], device: str) -> Iterator[list[Shard]]:
    """Yields the groups on `device`, copying the next one while one is used; the caller should drop each when done."""
    if not device.startswith("cuda") or all(tensor.is_cuda for group in groups for shard in group for tensor in shard):
        yield from ([tuple(tensor.to(device) for tensor in shard) for shard in group] for group in groups)
        return
    copies, compute = _stream(device), torch.cuda.current_stream(device)

    def start(group: Sequence[Shard]) -> list[Shard]:
        with torch.cuda.stream(copies):
            return [tuple(tensor.to(device, non_blocking=True) for tensor in shard) for shard in group]

    transfers = [start(groups[0])]
    for next_group in [*groups[1:], ()]:
        compute.wait_stream(copies)
        for shard in transfers[0]:
            for tensor in shard:
                tensor.record_stream(compute)  # else its memory could be reused while a step still reads it
        transfers.append(start(next_group))
        yield transfers.pop(0)


@functools.cache
def _stream(device: str) -> torch.cuda.Stream:
    """One stream for all epochs, because memory freed on one stream cannot be reused on another."""
    return torch.cuda.Stream(device)


def pinned(shards: Sequence[Shard]) -> list[Shard]:
    """The shards in pinned memory, if they take at most a quarter of the free memory (other workers may pin as much);
    unchanged if they take more, or if the system refuses."""
    import psutil

    unpinned = [tensor for shard in shards for tensor in shard if tensor.is_cpu and not tensor.is_pinned()]
    size = sum(1 << (tensor.nbytes - 1).bit_length() for tensor in unpinned)  # the allocator rounds to powers of two
    if size > psutil.virtual_memory().available // 4:
        return list(shards)
    try:
        return [tuple(tensor.pin_memory() if tensor.is_cpu else tensor for tensor in shard) for shard in shards]
    except RuntimeError:  # over this user's limit for locked memory
        return list(shards)

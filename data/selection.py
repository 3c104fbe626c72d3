"""Choosing rows from a stream: a seeded sample in one pass, keeping only the sample in memory.

In: items one by one, each with a key; at most one item per key is chosen. Out: the chosen items, in an order that
depends only on seed and keys, never on the order of the stream or on the machine.
"""

from __future__ import annotations

import hashlib
import heapq
from typing import Generic, TypeVar

Item = TypeVar("Item")


def fingerprint(key: str, seed: int = 0) -> int:
    """64-bit hash of a key, the same on every machine and Python version."""
    digest = hashlib.blake2b(key.encode("utf-8"), digest_size=8, salt=seed.to_bytes(16, "little", signed=True))
    return int.from_bytes(digest.digest(), "little")


class Sample(Generic[Item]):
    """The `size` items with the smallest fingerprints of all those offered, one per key.

    The first n items of a larger sample are the sample of size n: evaluation rows taken from the front do not change
    with the number of training rows. `offered` counts all items, `repeated` those whose key was already in the sample.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.offered = self.repeated = 0
        self._heap: list[tuple[int, Item]] = []
        self._held: set[int] = set()

    def offer(self, key: str, item: Item) -> None:
        """Considers one item."""
        self.offered += 1
        rank = fingerprint(key, self.seed)
        if rank in self._held:
            self.repeated += 1
            return
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, (-rank, item))
        elif self._heap and rank < -self._heap[0][0]:
            self._held.discard(-heapq.heapreplace(self._heap, (-rank, item))[0])
        else:
            return
        self._held.add(rank)

    def items(self) -> list[Item]:
        """The sample, smallest fingerprint first."""
        return [item for _, item in sorted(self._heap, key=lambda pair: -pair[0])]

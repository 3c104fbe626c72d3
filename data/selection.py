"""Samples rows from a stream: seeded, in one pass, keeping only the sample in memory.

In: items one by one, each with a key and a text by which copies are recognised. Out: the chosen items, in an order that
depends only on seed and keys, never on the order of the stream or on the machine.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")


def fingerprint(key: str, seed: int = 0) -> int:
    """64-bit hash of a key, the same on every machine and Python version."""
    digest = hashlib.blake2b(key.encode("utf-8"), digest_size=8, salt=seed.to_bytes(16, "little", signed=True))
    return int.from_bytes(digest.digest(), "little")


class Sample(Generic[Item]):
    """The `size` items with the smallest fingerprints of all those offered.

    Items with the same key form a group, in which only the first of several `exact` copies is kept. Without `exact`,
    all items of a group are copies. Whole groups are ranked, so `items` may be longer than `size` by the rest of the
    last group.

    The first n items of a larger sample are the sample of size n: evaluation rows taken from the front do not change
    with the number of training rows. `offered` counts all items, `repeated` the copies of items in the sample; `copy`
    is the first of these.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.size, self.seed = size, seed
        self.offered = self.repeated = 0
        self.copy: Item | None = None
        self._held = 0
        self._ranks: list[int] = []
        """A heap of the groups' ranks, negated: the largest comes first."""
        self._groups: dict[int, dict[int, Item]] = {}

    def offer(self, key: str, item: Item, exact: str = "") -> None:
        """Considers one item."""
        self.offered += 1
        rank, copy = fingerprint(key, self.seed), fingerprint(exact, self.seed)
        if rank not in self._groups:
            if self._held >= self.size and (not self._ranks or rank > -self._ranks[0]):
                return
            heapq.heappush(self._ranks, -rank)
            self._groups[rank] = {}
        group = self._groups[rank]
        if copy in group:
            self.repeated += 1
            self.copy = item if self.copy is None else self.copy
            return
        group[copy] = item
        self._held += 1
        while self._ranks and self._held - len(self._groups[-self._ranks[0]]) >= self.size:
            self._held -= len(self._groups.pop(-heapq.heappop(self._ranks)))

    def items(self) -> list[Item]:
        """The sample, smallest fingerprint first; its order does not depend on the order of the offers."""
        return [item for rank in sorted(self._groups) for _, item in sorted(self._groups[rank].items(), key=_first)]


def _first(pair: tuple[int, object]) -> int:
    return pair[0]


def first_of_each(items: Sequence[Item], label: Callable[[Item], str], most: int) -> list[Item]:
    """At most `most` items, or one of each label if there are more labels: the first of each, in equal shares.

    >>> first_of_each(["a1", "a2", "b1", "a3"], lambda item: item[0], 2)
    ['a1', 'b1']
    """
    by_label: dict[str, list[Item]] = {}
    for item in items:
        by_label.setdefault(label(item), []).append(item)
    share = max(1, most // max(1, len(by_label)))
    return [item for items in by_label.values() for item in items[:share]]

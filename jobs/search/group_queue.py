"""Chooses the group of the next trial, so that workers reuse the data they have cached.

In: each group's remaining trials and the data they read; starts and ends of trials. Out: the next group. A worker
caches what its last trial read, and Tune gives the next trial to the worker that has just become free.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Mapping


class GroupQueue:
    """Limits each group to the number of concurrent trials that fills the machine. With at least as many groups as
    slots, that is one trial per group: its proposals and early stops then depend only on its own trials, in order.
    `groups` is the total number if this queue holds only some of them, so that the limit is the same for any part."""

    def __init__(
        self, remaining: Mapping[str, int], reads: Mapping[str, str], at_once: int, groups: int | None = None
    ) -> None:
        self.left, self._reads = dict(remaining), reads
        self._limit = math.ceil(at_once / (groups or len(remaining)))
        self._running: Counter[str] = Counter()
        self._cached: list[str] = []
        """Data cached by each free worker, in the order in which they became free."""

    def may_start(self, name: str) -> bool:
        """Whether another trial of the group may run now."""
        return self._running[name] < self._limit

    def next_group(self, exclude: Collection[str] = ()) -> str | None:
        """Picks the next group to run, skipping `exclude`, and counts its trial as started. Prefers one whose data the
        free worker has cached, then one that no other worker is reading; ties go to the most trials left."""
        allowed = [name for name, count in self.left.items() if count and self.may_start(name) and name not in exclude]
        if not allowed:
            return None
        cached = self._cached.pop() if self._cached else None
        in_use = {self._reads[name] for name, count in self._running.items() if count}

        def priority(name: str) -> tuple[bool, bool, int]:
            return self._reads[name] == cached, self._reads[name] not in in_use, self.left[name]

        name = max(allowed, key=priority)
        self.left[name] -= 1
        self._running[name] += 1
        return name

    def started_together(self, name: str, count: int) -> None:
        """The worker has started `count` more trials of the group along with the one it was just given."""
        self.left[name] -= count

    def restarted(self, name: str) -> None:
        """A trial of the group has been started again."""
        self._running[name] += 1

    def ended(self, name: str) -> None:
        """A trial of the group has ended, and its worker is free."""
        self._running[name] -= 1
        self._cached.append(self._reads[name])


def count_reads(remaining: Mapping[str, int], reads: Mapping[str, str], workers: int) -> int:
    """How often a worker reads data that it has not cached, if all trials take the same time."""
    queue = GroupQueue(remaining, reads, workers)
    free, cached = list(range(workers)), [""] * workers
    running: deque[tuple[int, str]] = deque()
    count = 0
    while True:
        while free and (name := queue.next_group()) is not None:
            worker = free.pop()
            count += cached[worker] != reads[name]
            cached[worker] = reads[name]
            running.append((worker, name))
        if not running:
            return count
        worker, name = running.popleft()
        queue.ended(name)
        free.append(worker)

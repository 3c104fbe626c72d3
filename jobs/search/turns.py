"""Which group's trial comes next, so that a worker stays with what it has read.

In: for each group how many trials it has left and what they read; what has started and ended. Out: the next group. A
worker keeps what its last trial read, and Tune hands the next trial to the worker whose last one has just ended.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Collection, Mapping


class Turns:
    """A group never runs more trials at once than it takes to fill the machine. With as many groups as fit at once,
    that is one: what is proposed and what is stopped early then depends only on the group's own trials, in order.
    `groups` is how many there are, where these are only some of them: the limit is the same for any part."""

    def __init__(
        self, left: Mapping[str, int], reads: Mapping[str, str], at_once: int, groups: int | None = None
    ) -> None:
        self.left, self._reads = dict(left), reads
        self._most = math.ceil(at_once / (groups or len(left)))
        self._busy: Counter[str] = Counter()
        self._held: list[str] = []
        """What workers that are free have read, the last one last."""

    def may_start(self, name: str) -> bool:
        """Whether another trial of the group may run now."""
        return self._busy[name] < self._most

    def next_group(self, exclude: Collection[str] = ()) -> str | None:
        """Picks the next group to run, skipping `exclude`, and counts its trial as started. Prefers one whose data the
        free worker has cached, then one that no other worker is reading; ties go to the most trials left."""
        allowed = [name for name, left in self.left.items() if left and self.may_start(name) and name not in exclude]
        if not allowed:
            return None
        held = self._held.pop() if self._held else None
        elsewhere = {self._reads[name] for name, count in self._busy.items() if count}

        def choice(name: str) -> tuple[bool, bool, int]:
            return self._reads[name] == held, self._reads[name] not in elsewhere, self.left[name]

        name = max(allowed, key=choice)
        self.left[name] -= 1
        self._busy[name] += 1
        return name

    def beside(self, name: str, count: int) -> None:
        """So many more trials of the group have started beside the one just taken, by the same worker."""
        self.left[name] -= count

    def again(self, name: str) -> None:
        """A trial of the group has started once more."""
        self._busy[name] += 1

    def ended(self, name: str) -> None:
        """A trial of the group has ended, and its worker is free."""
        self._busy[name] -= 1
        self._held.append(self._reads[name])


def count_reads(left: Mapping[str, int], reads: Mapping[str, str], workers: int) -> int:
    """How often a worker reads something that it does not hold, if all trials take the same time."""
    turns = Turns(left, reads, workers)
    free, held = list(range(workers)), [""] * workers
    running: deque[tuple[int, str]] = deque()
    count = 0
    while True:
        while free and (name := turns.next_group()) is not None:
            worker = free.pop()
            count += held[worker] != reads[name]
            held[worker] = reads[name]
            running.append((worker, name))
        if not running:
            return count
        worker, name = running.popleft()
        turns.ended(name)
        free.append(worker)

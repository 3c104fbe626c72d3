"""Fan-out: runs tasks on Ray actors, which keep loaded models between tasks.

In: each worker's share of the machine, then module-level functions and their tasks. Out: each task's result as it
finishes. If a worker dies, only its task is retried, on another worker; if a task raises, the error is recorded and the
others continue.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from data.rows import one_line
from jobs.cluster.connection import Share


class Outcome(NamedTuple):
    """A finished task: its result or error, the time its worker started it, and its duration in seconds."""

    task: Any
    result: Any = None
    error: str | None = None
    started: float = 0.0
    seconds: float = 0.0


class _Worker:
    """Runs tasks one after another; models stay loaded in the process between them."""

    def __init__(self, threads: int) -> None:
        from jobs.cluster import environment

        environment.prepare()
        import torch

        torch.set_num_threads(threads)

    def ping(self) -> None:
        """Ends once the worker is there."""

    def run(self, function: Callable[[Any], Any], task: Any) -> Outcome:
        started = time.time()
        try:
            outcome = Outcome(task, function(task))
        except Exception as error:
            outcome = Outcome(task, error=f"{type(error).__name__}: {one_line(error, 500)}")
        return outcome._replace(started=started, seconds=time.time() - started)


class Queue:
    """Waiting tasks by affinity, each with the number of times it has been tried."""

    def __init__(self, affinity: Callable[[Any], Any]) -> None:
        self._affinity = affinity
        self._waiting: dict[Any, deque[tuple[Any, int]]] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def add(self, task: Any, tries: int) -> None:
        self._waiting.setdefault(self._affinity(task), deque()).append((task, tries))

    def take(self, preferred: Any, busy: Collection[Any]) -> tuple[Any, int]:
        """The next task of the `preferred` affinity; if there is none, of the first affinity not in `busy`; else of the
        first."""
        chosen = preferred
        if preferred not in self._waiting:
            chosen = next((kind for kind in self._waiting if kind not in busy), next(iter(self._waiting)))
        waiting = self._waiting[chosen].popleft()
        if not self._waiting[chosen]:
            del self._waiting[chosen]
        return waiting


class Pool:
    """Workers that stay alive between fan-outs, until `close` frees their share of the machine.

    Each task adds a line to the file `timeline`: its function, when it started and how many seconds it took.
    """

    def __init__(self, share: Share, timeline: Path | None = None) -> None:
        self.share, self._timeline = share, timeline
        self._idle: list[Any] = []
        self._started: dict[Any, Any] = {}

    def run(
        self,
        function: Callable[[Any], Any],
        tasks: Sequence[Any],
        max_retries: int = 1,
        affinity: Callable[[Any], Any] = id,
    ) -> Iterator[Outcome]:
        """Yields outcomes in the order they finish; pass the longest tasks first.

        A worker prefers tasks with the `affinity` of its last one, then an affinity that no other worker is on, then
        any.
        """
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        waiting = Queue(affinity)
        for task in tasks:
            waiting.add(task, 0)
        running: dict[Any, tuple[Any, Any, int]] = {}
        last: dict[Any, Any] = {}
        try:
            while waiting or running:
                while waiting and len(running) < self.share.at_once:
                    worker = self._idle.pop() if self._idle else self._start()
                    busy = {affinity(task) for _, task, _ in running.values()}
                    task, tries = waiting.take(last.get(worker), busy)
                    last[worker] = affinity(task)
                    running[worker.run.remote(function, task)] = (worker, task, tries)
                if self._idle and (unstarted := self._unstarted(running)):
                    # The cluster may never have room for this worker, while idle ones hold theirs.
                    worker, task, tries = running.pop(unstarted)
                    ray.kill(worker)
                    waiting.add(task, tries)
                    continue
                (ready,), _ = ray.wait(list(running), num_returns=1)
                worker, task, tries = running.pop(ready)
                try:
                    outcome = ray.get(ready)
                except RayActorError as error:
                    if tries < max_retries:
                        waiting.add(task, tries + 1)
                        continue
                    outcome = Outcome(task, error=f"its worker died {tries + 1} times ({_reason(error)})")
                except RayTaskError as error:  # such as a task that cannot be unpickled
                    self._idle.append(worker)
                    outcome = Outcome(task, error=_reason(error))
                else:
                    self._idle.append(worker)
                    self._note(function, outcome)
                yield outcome
        finally:
            for worker, _, _ in running.values():
                ray.kill(worker)

    def _unstarted(self, running: Mapping[Any, tuple[Any, Any, int]]) -> Any:
        """A running task whose worker is not there yet; None if there is none."""
        import ray

        for ref, (worker, _, _) in running.items():
            if not ray.wait([self._started[worker]], timeout=0)[0]:
                return ref
        return None

    def _note(self, function: Callable[[Any], Any], outcome: Outcome) -> None:
        if self._timeline is not None:
            line = {"work": function.__name__, "started": outcome.started, "seconds": outcome.seconds}
            with self._timeline.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _start(self) -> Any:
        import ray

        options = {"num_cpus": self.share.cpus, "num_gpus": self.share.gpus, "max_restarts": 0}
        worker: Any = ray.remote(_Worker).options(**options).remote(max(1, self.share.cpus))
        self._started[worker] = worker.ping.remote()
        return worker

    def close(self) -> None:
        """Stops the idle workers; a later `run` starts new ones."""
        import ray

        for worker in self._idle:
            ray.kill(worker)
        self._idle.clear()


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__

"""Fan-out: tasks over Ray actors that keep what they have loaded.

In: a module-level function, a list of tasks and the share of the machine each worker gets. Out: each task's result as
it finishes. A worker's death loses its task only, which is tried again elsewhere; a task that raises is recorded and
the others go on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from jobs.cluster import Share


class Outcome(NamedTuple):
    """A finished task: its result, or why it has none."""

    task: Any
    result: Any = None
    error: str | None = None


class _Worker:
    """Runs tasks one after the other; models stay loaded in the process between them."""

    def __init__(self, threads: int) -> None:
        from jobs import environment

        environment.prepare()
        import torch

        torch.set_num_threads(threads)

    def run(self, function: Callable[[Any], Any], task: Any) -> Outcome:
        try:
            return Outcome(task, function(task))
        except Exception as error:
            return Outcome(task, error=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")


def fan_out(
    function: Callable[[Any], Any], tasks: Sequence[Any], share: Share, max_retries: int = 1
) -> Iterator[Outcome]:
    """Yields outcomes in the order they finish; `tasks` should come longest first."""
    import ray
    from ray.exceptions import RayActorError, RayTaskError

    if not tasks:
        return
    waiting: deque[tuple[Any, int]] = deque((task, 0) for task in tasks)
    options = {"num_cpus": share.cpus, "num_gpus": share.gpus, "max_restarts": 0}
    make = ray.remote(_Worker).options(**options).remote
    running: dict[Any, tuple[Any, Any, int]] = {}

    def start(worker: Any) -> None:
        task, tries = waiting.popleft()
        running[worker.run.remote(function, task)] = (worker, task, tries)

    try:
        for _ in range(min(share.at_once, len(tasks))):
            start(make(share.cpus))
        while running:
            (done,), _ = ray.wait(list(running), num_returns=1)
            worker, task, tries = running.pop(done)
            try:
                yield ray.get(done)
            except RayActorError as error:
                if tries < max_retries:
                    waiting.append((task, tries + 1))
                else:
                    yield Outcome(task, error=f"its worker died {tries + 1} times ({_reason(error)})")
                worker = make(share.cpus) if waiting else None
            except RayTaskError as error:
                yield Outcome(task, error=_reason(error))
            if waiting and worker is not None:
                start(worker)
            elif worker is not None:
                ray.kill(worker)
    finally:
        for worker, _, _ in running.values():
            ray.kill(worker)


def _reason(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__

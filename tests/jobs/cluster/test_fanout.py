"""Fan-out over real Ray actors."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.cluster.connection import Share, share_of
from jobs.cluster.fanout import Pool, Queue
from jobs.errors import RequestError
from search_spaces.schema import Compute


@pytest.fixture(scope="module")
def timeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fanout") / "timeline.jsonl"


@pytest.fixture(scope="module")
def pool(share: Share, timeline: Path) -> Iterator[Pool]:
    """One for all tests: a worker takes seconds to start, and what a test kills is replaced."""
    pool = Pool(share, timeline)
    yield pool
    pool.close()


def test_tf32_without_a_gpu_is_one_sentence(share: Share) -> None:
    with pytest.raises(RequestError, match=r"compute\.precision: got tf32, which needs a GPU"):
        share_of(Compute(precision="tf32", gpus_per_trial=0))


def square(task: int) -> int:
    return task * task


def fail_on_three(task: int) -> int:
    if task == 3:
        raise ValueError("three is\nnot wanted")
    return task


def die_once(task: tuple[str, int]) -> int:
    marker = Path(task[0]) / f"died_{task[1]}"
    if task[1] == 2 and not marker.exists():
        marker.touch()
        os._exit(1)
    return task[1]


def always_die(task: int) -> int:
    os._exit(1)


def process(task: object) -> int:
    return os.getpid()


def test_every_task_is_done_once(pool: Pool) -> None:
    outcomes = list(pool.run(square, range(20)))
    assert sorted(outcome.result for outcome in outcomes) == [n * n for n in range(20)]


def test_the_timeline_tells_when_each_task_ran(pool: Pool, timeline: Path) -> None:
    before = time.time()
    outcomes = list(pool.run(fail_on_three, range(5)))
    lines = [json.loads(line) for line in timeline.read_text().splitlines()][-5:]
    assert {line["work"] for line in lines} == {"fail_on_three"}
    assert [line["started"] for line in lines] == [outcome.started for outcome in outcomes]
    assert all(before <= line["started"] <= line["started"] + line["seconds"] <= time.time() for line in lines)


def test_workers_are_kept_between_tasks(pool: Pool) -> None:
    pids = {outcome.result for outcome in pool.run(process, range(12))}
    assert len(pids) <= pool.share.at_once
    assert {outcome.result for outcome in pool.run(process, range(4))} <= pids


def test_a_task_that_raises_is_recorded_and_the_others_go_on(pool: Pool) -> None:
    outcomes = {outcome.task: outcome for outcome in pool.run(fail_on_three, range(6))}
    assert outcomes[3][:3] == (3, None, "ValueError: three is not wanted")
    assert all(outcome.error is None for task, outcome in outcomes.items() if task != 3)
    assert len(outcomes) == 6


def test_a_dead_workers_task_is_tried_again(pool: Pool, tmp_path: Path) -> None:
    outcomes = list(pool.run(die_once, [(str(tmp_path), n) for n in range(5)], max_retries=1))
    assert sorted(outcome.result for outcome in outcomes) == list(range(5))


def test_a_task_that_always_kills_its_worker_is_given_up(pool: Pool) -> None:
    (outcome,) = pool.run(always_die, [7], max_retries=1)
    assert outcome.task == 7
    assert "died 2 times" in str(outcome.error)


def test_a_worker_that_finds_no_room_holds_nothing_up(pool: Pool) -> None:
    """As after the loss of a node: the share counts on more than there is now."""
    small = Pool(Share(pool.share.cpus, pool.share.gpus, 50))
    pool.close()  # gives its room to the other
    try:
        outcomes = list(small.run(square, range(50)))
    finally:
        small.close()
    assert sorted(outcome.result for outcome in outcomes) == [n * n for n in range(50)]


def test_no_tasks(pool: Pool) -> None:
    assert list(pool.run(square, [])) == []


def test_a_worker_stays_with_its_affinity_then_helps() -> None:
    waiting = Queue(affinity=lambda task: task[0])
    for task in ("a1", "b1", "a2", "c1", "c2"):
        waiting.add(task, 0)
    assert waiting.take(None, []) == ("a1", 0)
    assert waiting.take("c", ["a"]) == ("c1", 0), "its own first"
    assert waiting.take(None, ["a"]) == ("b1", 0), "then one that nobody is working on"
    assert waiting.take("b", ["a", "c"]) == ("a2", 0), "then whatever is left"
    assert bool(waiting)
    assert waiting.take("b", ["c"]) == ("c2", 0)
    assert not waiting


def test_grouped_tasks_are_all_done(pool: Pool) -> None:
    tasks = [(name, number) for number in range(3) for name in ("a", "b")]
    outcomes = list(pool.run(process, tasks, affinity=lambda task: task[0]))
    assert sorted(outcome.task for outcome in outcomes) == sorted(tasks)

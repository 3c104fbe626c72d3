"""Which group comes next: a worker keeps to the data it has read."""

from __future__ import annotations

import pytest

from jobs.search.group_queue import GroupQueue, count_reads


def groups(layers: int, widths: int, trials: int) -> tuple[dict[str, int], dict[str, str]]:
    names = [(f"layer {layer}, width {width}", f"layer {layer}") for layer in range(layers) for width in range(widths)]
    return {name: trials for name, _ in names}, dict(names)


def test_every_trial_gets_its_turn_and_a_group_no_more_at_once_than_needed() -> None:
    left, reads = groups(2, 1, 3)
    queue = GroupQueue(left, reads, 2)
    assert [queue.next_group(), queue.next_group(), queue.next_group()] == [
        "layer 0, width 0",
        "layer 1, width 0",
        None,
    ]
    queue.ended("layer 1, width 0")
    assert queue.next_group() == "layer 1, width 0"
    queue.ended("layer 0, width 0")
    queue.restarted("layer 0, width 0")
    assert queue.next_group() is None, "a trial that runs once more takes its group's place"


def test_some_groups_of_a_search_run_as_many_trials_at_once_as_among_all() -> None:
    left, reads = groups(1, 1, 4)
    alone, among_four = GroupQueue(left, reads, 4), GroupQueue(left, reads, 4, groups=4)
    for queue, most in ((alone, 4), (among_four, 1)):
        assert sum(queue.next_group() is not None for _ in range(5)) == most


@pytest.mark.parametrize(("workers", "most"), [(1, 104), (8, 112), (64, 190)])
def test_the_full_studys_layers_are_read_about_once(workers: int, most: int) -> None:
    """26 layers with a change and three bases each are 104 things to read, of 24 trials."""
    left, reads = groups(104, 3, 8)
    found = count_reads(left, reads, workers)
    assert 104 <= found <= most < 104 * 24 / 8

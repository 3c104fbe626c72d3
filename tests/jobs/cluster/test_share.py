"""What a trial of several workers takes, and what cannot be had."""

from __future__ import annotations

import pytest

from jobs.cluster.connection import Share, _fit
from jobs.errors import RequestError


def test_workers_take_what_a_trial_would() -> None:
    assert Share(2, 1.0, 8).of_several(1, "deltas.workers_per_trial") == Share(2, 1.0, 8)
    assert Share(2, 1.0, 8).of_several(4, "deltas.workers_per_trial") == Share(0, 0.0, 2)


@pytest.mark.parametrize(
    ("node", "cpus", "gpus", "trials"),
    [
        ({"CPU": 7.0}, 2, 0.0, 3),
        ({"CPU": 16.0}, 1, 1.0, 0),
        ({"CPU": 16.0, "GPU": 2.0}, 1, 0.4, 4),
        ({"CPU": 16.0, "GPU": 2.0}, 1, 0.6, 2),
        ({"CPU": 16.0, "GPU": 2.0}, 1, 0.1, 16),
        ({"CPU": 64.0, "GPU": 8.0}, 4, 2.0, 4),
        ({"memory": 1.0}, 1, 0.0, 0),
    ],
)
def test_a_trial_is_on_one_node_and_its_share_of_a_gpu_on_one_gpu(node, cpus: int, gpus: float, trials: int) -> None:
    assert _fit(node, cpus, gpus) == trials


@pytest.mark.parametrize(
    ("share", "said"),
    [
        (Share(1, 0.25, 8), "deltas.workers_per_trial: got 4, .* compute.gpus_per_trial is 0.25"),
        (Share(1, 0.0, 3), "deltas.workers_per_trial: got 4, .* room for 3 at once"),
    ],
)
def test_what_does_not_fit_is_named(share: Share, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        share.of_several(4, "deltas.workers_per_trial")

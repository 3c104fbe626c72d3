"""What a trial of several workers takes, and what cannot be had."""

from __future__ import annotations

import pytest

from jobs.cluster.connection import Share
from jobs.errors import RequestError


def test_workers_take_what_a_trial_would() -> None:
    assert Share(2, 1.0, 8).of_several(1, "deltas.workers_per_trial") == Share(2, 1.0, 8)
    assert Share(2, 1.0, 8).of_several(4, "deltas.workers_per_trial") == Share(0, 0.0, 2)


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

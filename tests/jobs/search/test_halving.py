"""Which trial a scheduler starts next."""

from __future__ import annotations

from types import SimpleNamespace

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from jobs.search.halving import InOrder


def test_the_next_trial_is_that_of_tunes_own_scheduler() -> None:
    trials = [Trial("anything", trial_id=f"search_{number:05d}", stub=True) for number in range(40)]
    for number, trial in enumerate(trials):
        trial.set_status(Trial.TERMINATED if number < 30 else Trial.RUNNING if number == 30 else Trial.PENDING)
    controller = SimpleNamespace(get_trials=lambda: trials, get_live_trials=lambda: set(trials[30:]))
    for trial in trials[31:]:
        assert InOrder().choose_trial_to_run(controller) is FIFOScheduler().choose_trial_to_run(controller) is trial
        trial.set_status(Trial.RUNNING)
    assert InOrder().choose_trial_to_run(controller) is None

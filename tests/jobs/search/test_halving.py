"""Which trial a scheduler starts next."""

from __future__ import annotations

from types import SimpleNamespace

from ray.tune.experiment import Trial
from ray.tune.schedulers import FIFOScheduler

from jobs.search.halving import InOrder


def test_the_next_trial_is_that_of_tunes_own_scheduler() -> None:
    trials, ours = [Trial("anything", trial_id=Trial.generate_id(), stub=True) for _ in range(40)], InOrder()
    for trial in trials:
        ours.on_trial_add(None, trial)
    for number, trial in enumerate(trials):
        trial.set_status(Trial.TERMINATED if number < 30 else Trial.RUNNING if number == 30 else Trial.PENDING)
    controller = SimpleNamespace(get_trials=lambda: trials, get_live_trials=lambda: set(trials[30:]))
    for trial in trials[31:]:
        assert ours.choose_trial_to_run(controller) is FIFOScheduler().choose_trial_to_run(controller) is trial
        trial.set_status(Trial.RUNNING)
    assert ours.choose_trial_to_run(controller) is None

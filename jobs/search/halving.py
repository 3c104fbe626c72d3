"""Schedulers for Ray Tune: trials in the order of the search, and early stopping within groups of trials, by
asynchronous successive halving with a bracket for each group.

In: how early and how often a trial may be stopped, and groups. Out: a scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from jobs.search.studies import Group, trials_of


@dataclass(frozen=True)
class EarlyStopping:
    """Asynchronous successive halving (arXiv 1810.05934); `grace` and `longest` count validations."""

    grace: int
    longest: int
    reduction_factor: int


class InOrder(FIFOScheduler):
    """Tune's own, but it looks for the next trial among those that have not ended: looking through all of them took a
    third of the driver's time after 4,000 trials. None is ever paused here."""

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        waiting = [trial for trial in tune_controller.get_live_trials() if trial.status == Trial.PENDING]
        return min(waiting, key=lambda trial: trial.trial_id, default=None)  # Tune counts in its names


class GroupedHalving(InOrder):
    """One AsyncHyperBandScheduler per group, which knows what the group's finished trials reported."""

    def __init__(self, settings: EarlyStopping, groups: list[Group]) -> None:
        super().__init__()
        self._brackets = {group.name: self._bracket_of(settings, group) for group in groups}

    def _bracket_of(self, settings: EarlyStopping, group: Group) -> AsyncHyperBandScheduler:
        bracket = AsyncHyperBandScheduler(
            time_attr="training_iteration",
            metric="val_loss",
            mode="min",
            # One less than the longest run: a rung at its end would only mark a complete trial as stopped.
            max_t=max(settings.longest - 1, settings.grace),
            grace_period=settings.grace,
            reduction_factor=settings.reduction_factor,
            stop_last_trials=False,
        )
        for result in trials_of(group):
            _replay(bracket, result["trial"], result["history"])
        return bracket

    def stops(self, group: str, number: int, history: Sequence[dict[str, Any]]) -> int | None:
        """After how many validations a trial that has run to its end would have been stopped; None if it would not."""
        return _replay(self._brackets[group], number, history)

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._brackets[trial.config["group"]].on_trial_add(tune_controller, _stand_in(trial.config["trial"]))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("final"):
            return TrialScheduler.CONTINUE
        bracket = self._brackets[trial.config["group"]]
        return bracket.on_trial_result(tune_controller, _stand_in(trial.config["trial"]), result)


def _replay(bracket: AsyncHyperBandScheduler, number: int, history: Sequence[dict[str, Any]]) -> int | None:
    """Tells a bracket of a trial's validations up to the one at which it stops the trial, whose number is returned."""
    trial = _stand_in(number)
    bracket.on_trial_add(NO_CONTROLLER, trial)
    for iteration, figures in enumerate(history, start=1):
        if math.isfinite(loss := figures.get("val_loss", math.nan)):
            told = {"training_iteration": iteration, "val_loss": loss}
            if bracket.on_trial_result(NO_CONTROLLER, trial, told) == TrialScheduler.STOP:
                return iteration
    return None


NO_CONTROLLER: Any = None
"""Passed in place of Tune's controller: the methods of a bracket called here do not look at it."""


def _stand_in(number: int) -> Any:
    """Stands in for a Tune trial, named by its number; Tune gives every retry a new name."""
    return SimpleNamespace(trial_id=str(number))

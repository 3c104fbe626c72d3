"""Schedulers for Ray Tune: trials in the order of the search, and early stopping within groups of trials, by
asynchronous successive halving with a bracket for each group.

In: how early and how often a trial may be stopped, and groups. Out: a scheduler.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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

    def __init__(self) -> None:
        super().__init__()
        self._added: dict[str, int] = {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._added[trial.trial_id] = len(self._added)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        waiting = [trial for trial in tune_controller.get_live_trials() if trial.status == Trial.PENDING]
        return min(waiting, key=lambda trial: self._added[trial.trial_id], default=None)


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
            for _ in _decisions(bracket, result["trial"], result["history"]):
                pass  # what was decided at the time stands
        return bracket

    def replay(self, group: str, number: int, history: Sequence[dict[str, Any]]) -> int | None:
        """Tells the bracket what a trial that has run to its end reported, up to where it would have been stopped;
        returns after how many validations that is, or None."""
        for iteration, decision in _decisions(self._brackets[group], number, history):
            if decision == TrialScheduler.STOP:
                return iteration
        return None

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        self._brackets[trial.config["group"]].on_trial_add(tune_controller, _stand_in(trial.config["trial"]))

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("final"):
            return TrialScheduler.CONTINUE
        bracket = self._brackets[trial.config["group"]]
        return bracket.on_trial_result(tune_controller, _stand_in(trial.config["trial"]), result)


def _decisions(
    bracket: AsyncHyperBandScheduler, number: int, history: Sequence[dict[str, Any]]
) -> Iterator[tuple[int, str]]:
    """What a bracket says to each of a trial's validations, which it is told one after the other."""
    trial = _stand_in(number)
    bracket.on_trial_add(NO_CONTROLLER, trial)
    for iteration, figures in enumerate(history, start=1):
        if math.isfinite(loss := figures.get("val_loss", math.nan)):
            told = {"training_iteration": iteration, "val_loss": loss}
            yield iteration, bracket.on_trial_result(NO_CONTROLLER, trial, told)


NO_CONTROLLER: Any = None
"""Passed in place of Tune's controller: the methods of a bracket called here do not look at it."""


def _stand_in(number: int) -> Any:
    """Stands in for a Tune trial, named by its number; Tune gives every retry a new name."""
    return SimpleNamespace(trial_id=str(number))

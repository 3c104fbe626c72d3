"""Schedulers for Ray Tune: trials in the search's order, and asynchronous successive halving with a bracket per group.

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
    """Tune's own, but it looks for the next trial among the live ones only: scanning all of them took a third of the
    driver's time after 4,000 trials. No trial is ever paused here."""

    def __init__(self) -> None:
        super().__init__()
        self._added: dict[str, int] = {}

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._added[trial.trial_id] = len(self._added)

    def choose_trial_to_run(self, tune_controller: Any) -> Any:
        waiting = [trial for trial in tune_controller.get_live_trials() if trial.status == Trial.PENDING]
        return min(waiting, key=lambda trial: self._added[trial.trial_id], default=None)


class GroupedHalving(InOrder):
    """One AsyncHyperBandScheduler per group, primed with the reports of the group's finished trials."""

    def __init__(self, settings: EarlyStopping, groups: list[Group]) -> None:
        super().__init__()
        self._brackets = {group.name: self._bracket_of(settings, group) for group in groups}

    def _bracket_of(self, settings: EarlyStopping, group: Group) -> AsyncHyperBandScheduler:
        bracket = AsyncHyperBandScheduler(
            time_attr="training_iteration",
            metric="val_loss",
            mode="min",
            # One less than the longest run: a rung at the very end would only mark complete trials as stopped.
            max_t=max(settings.longest - 1, settings.grace),
            grace_period=settings.grace,
            reduction_factor=settings.reduction_factor,
            stop_last_trials=False,
        )
        for result in trials_of(group):
            for _ in _decisions(bracket, result["trial"], result["history"]):
                pass  # those trials have ended; only the bracket needs to see their reports
        return bracket

    def replay(self, group: str, number: int, history: Sequence[dict[str, Any]]) -> int | None:
        """Feeds a completed trial's history to the bracket until it says stop; returns the number of validations up to
        there, or None if the trial would have run to the end."""
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
    """Replays a trial's validations through a bracket and yields its decision on each."""
    trial = _stand_in(number)
    bracket.on_trial_add(NO_CONTROLLER, trial)
    for iteration, figures in enumerate(history, start=1):
        if math.isfinite(loss := figures.get("val_loss", math.nan)):
            result = {"training_iteration": iteration, "val_loss": loss}
            yield iteration, bracket.on_trial_result(NO_CONTROLLER, trial, result)


NO_CONTROLLER: Any = None
"""Passed in place of Tune's controller, which the bracket methods called here do not use."""


def _stand_in(number: int) -> Any:
    """Stands in for a Tune trial, identified by its number, because Tune gives every retry a new id."""
    return SimpleNamespace(trial_id=str(number))

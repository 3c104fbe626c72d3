"""Search over groups: one Optuna study and one early-stopping bracket per group, all trials in one Ray Tune pool.

In: groups (a space, a number of trials, constants) and a trial function. Out: `trial_NNNN/result.json` in each group's
folder. Losses are comparable only within a group, so groups share nothing but the machine; a repeated call runs only
the missing trials.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any

import optuna
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.search import Searcher

from jobs.cluster.connection import Share
from jobs.errors import NO_STORAGE, no_storage
from jobs.files import write_json
from jobs.progress import Bar
from jobs.search.halving import EarlyStopping, GroupedHalving, InOrder
from jobs.search.studies import COMPLETE, FAILED, STOPPED, Again, Group, Storage, Study
from jobs.search.turns import Turns


@dataclass(frozen=True)
class Runtime:
    """Where a search runs: the Optuna storage, each trial's share of the machine, how often to retry a trial whose
    worker died, a folder for Tune's own files, and how many groups there are where a search is given some of them."""

    storage: Storage
    share: Share
    max_retries: int
    scratch: Path
    groups: int | None = None


def run_search(
    groups: list[Group],
    trial: Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], dict[str, Any]],
    runtime: Runtime,
    *,
    early_stopping: EarlyStopping | None,
    bar: Bar,
    on_trial: Callable[[Group, dict[str, Any]], None] = lambda group, result: None,
) -> None:
    """Runs every group's missing trials.

    `trial(config, report)` gets the constants, the searched values, `trial` (its number) and `folder`. It calls
    `report` with `step` and `val_loss` after each validation, and returns the figures of its result, including
    `val_loss`, or `failed` with the reason. An exception counts as a lost worker: the trial is retried up to
    `max_retries` times, and then it has failed.
    """
    share = runtime.share
    search = GroupedSearch(groups, runtime, bar, on_trial)
    if not search.missing:
        return
    scheduler = GroupedHalving(early_stopping, groups) if early_stopping else InOrder()

    logging.getLogger("ray.tune.execution.tune_controller").addFilter(_is_not_a_worker_death)
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # it lists every failed attempt as a failed trial

    def run(config: dict[str, Any]) -> None:
        try:
            figures = trial(config, lambda values: tune.report(dict(values)))
        except Exception as error:
            if (number := no_storage(error)) is None:
                raise
            figures = {"no_storage": number}  # the search ends here: no trial has failed
        tune.report({"val_loss": math.inf, **figures, "final": True})

    resources = {key.lower(): value for key, value in share.resources.items()}
    tuner = tune.Tuner(
        tune.with_resources(run, resources),
        tune_config=tune.TuneConfig(
            metric="val_loss",
            mode="min",
            search_alg=search,
            scheduler=scheduler,
            num_samples=-1,  # as many as the search proposes
            max_concurrent_trials=share.at_once,
            reuse_actors=True,
            trial_dirname_creator=lambda one: one.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(runtime.scratch),
            verbose=0,
            # Tune (2.60) can count the death of a reused worker twice and give up its trial, so the search retries.
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(),
            callbacks=[],
        ),
    )
    tuner.fit()
    if (number := search.no_storage) is not None:
        raise OSError(number, NO_STORAGE[number])


def _until_the_disk_fails(method: Callable[..., Any]) -> Callable[..., Any]:
    """Tune prints what its searcher raises, and goes on; an error of the disk ends the search once nothing runs."""

    @wraps(method)
    def call(self: GroupedSearch, *arguments: Any, **options: Any) -> Any:
        try:
            return method(self, *arguments, **options)
        except Exception as error:
            if (number := no_storage(error)) is None:
                raise
            self.no_storage = number
            return None

    return call


@dataclass
class _Running:
    group: Group
    trial: optuna.Trial | Again
    started: float
    history: list[dict[str, Any]] = field(default_factory=list)
    deaths: int = 0


class GroupedSearch(Searcher):
    """Asks one Optuna study per group for its next trial; `Turns` says which group's turn it is."""

    def __init__(
        self,
        groups: list[Group],
        runtime: Runtime,
        bar: Bar,
        on_trial: Callable[[Group, dict[str, Any]], None],
    ) -> None:
        super().__init__(metric="val_loss", mode="min")
        self._groups = {group.name: group for group in groups}
        self._max_retries, self._bar, self._on_trial = runtime.max_retries, bar, on_trial
        self._studies = {group.name: Study(group, runtime.storage) for group in groups}
        left = {group.name: max(0, group.trials - self._studies[group.name].finished) for group in groups}
        self._turns = Turns(left, {group.name: group.reads for group in groups}, runtime.share.at_once, runtime.groups)
        self._running: dict[str, _Running] = {}
        self._retries: list[_Running] = []
        self.no_storage: int | None = None
        """Why nothing more is started: the number of an error of the disk."""
        self.missing = sum(left.values())
        bar.start_at(sum(group.trials for group in groups) - self.missing)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        return True

    @_until_the_disk_fails
    def suggest(self, trial_id: str) -> Any:
        if self.no_storage is not None:
            return None if self._running else Searcher.FINISHED
        running = self._next()
        if running is None:
            return None if self._running else Searcher.FINISHED
        self._running[trial_id] = running
        group, number = running.group, running.trial.number
        return {
            **group.constants,
            **group.fixed,
            **running.trial.params,
            "group": group.name,
            "trial": number,
            "folder": str(group.folder / f"trial_{number:04d}"),
        }

    def _next(self) -> _Running | None:
        """A trial whose worker died, else one that has not been started, if one may start now."""
        if self._retries:
            running = self._retries.pop()
            self._turns.again(running.group.name)
            return running
        name = self._turns.take()
        if name is None:
            return None
        study = self._studies[name]
        return _Running(self._groups[name], study.unfinished.pop(0) if study.unfinished else study.ask(), time.time())

    @_until_the_disk_fails
    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        running = self._running.get(trial_id)
        if running is None or result.get("final") or "step" not in result:
            return
        seen = {entry["step"] for entry in running.history}
        if result["step"] in seen:  # a retried trial reports its steps again
            return
        running.history.append(_figures(result))
        if math.isfinite(result.get("val_loss", math.nan)):
            self._studies[running.group.name].report(running.trial, result["val_loss"], result["step"])
        self._bar.note(
            f"{running.group.name} trial {running.trial.number}: step {result['step']}, "
            f"val_loss {result.get('val_loss', math.nan):.4g}"
        )

    @_until_the_disk_fails
    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if result:
            self.on_trial_result(trial_id, result)
        running = self._running.pop(trial_id, None)
        if running is None:
            return
        self._turns.ended(running.group.name)
        if error and running.deaths < self._max_retries:
            running.deaths += 1
            self._retries.append(running)
            tries = f"{running.deaths} of {self._max_retries}"
            self._bar.line(
                f"{running.group.name} trial {running.trial.number}: its worker died, trying again ({tries})"
            )
            return
        figures = _figures(result or {})
        if (number := figures.pop("no_storage", None)) is not None:
            self.no_storage = number
            return
        value = figures.get("val_loss")
        reason = figures.pop("failed", None)
        if error or reason or value is None or not math.isfinite(value):
            state, reason = FAILED, reason or ("its worker died" if error else f"val_loss is {value}")
        else:
            state = COMPLETE if result and result.get("final") else STOPPED
        record = {
            "group": running.group.name,
            "trial": running.trial.number,
            "state": state,
            "value": None if state == FAILED else value,
            "params": {**running.group.fixed, **running.trial.params},
            "figures": figures,
            "history": running.history,
            "started": running.started,
            "seconds": time.time() - running.started,
            "reason": reason,
        }
        write_json(running.group.folder / f"trial_{running.trial.number:04d}" / "result.json", record)
        self._studies[running.group.name].tell(running.trial, record)
        self._on_trial(running.group, record)
        self._bar.advance()

    def __deepcopy__(self, memo: dict) -> GroupedSearch:
        return self

    def __reduce__(self) -> tuple:
        """Tune pickles its configuration; nothing in this object, such as a database URL, belongs in there."""
        return (Searcher, ())

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: studies and result files are the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing, like `save`."""


def _is_not_a_worker_death(record: logging.LogRecord) -> bool:
    """False for the traceback that Tune logs when a worker dies: the search reports that in one line."""
    return not (record.exc_info and isinstance(record.exc_info[1], RayActorError))


_TUNE_KEYS = {
    "timestamp", "time_this_iter_s", "time_total_s", "training_iteration", "pid", "hostname", "node_ip", "date",
    "trial_id", "time_since_restore", "iterations_since_restore", "done", "final", "checkpoint_dir_name",
    "should_checkpoint", "experiment_tag",
}  # fmt: skip


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    """The part of a result that the trial itself reported."""
    return {key: value for key, value in result.items() if key not in _TUNE_KEYS and not key.startswith("config/")}

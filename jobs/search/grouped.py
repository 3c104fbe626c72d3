"""Search over groups: one Optuna study and one early-stopping bracket per group, all trials in one Ray Tune pool.

In: groups (a space, a number of trials, constants) and a trial function. Out: `trial_NNNN/result.json` in each group's
folder. Losses are comparable only within a group, so groups share nothing but the machine. Calling it again runs only
the missing trials.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import optuna
from ray import tune
from ray.exceptions import RayActorError
from ray.tune.search import Searcher

from jobs.cluster.connection import Share
from jobs.errors import DISK_ERRORS, disk_errno
from jobs.files import write_json
from jobs.progress import Bar
from jobs.search.group_queue import GroupQueue
from jobs.search.halving import EarlyStopping, GroupedHalving, InOrder
from jobs.search.studies import COMPLETE, FAILED, STOPPED, Group, LostTrial, Storage, Study

NO_LOSS = {"val_loss": math.inf}
REPORT_SECONDS = 5.0
"""Without early stopping, a trial reports to the driver at most this often: each report blocks it until handled."""


@dataclass(frozen=True)
class Runtime:
    """Where a search runs: the Optuna storage, each trial's share of the machine, how often to retry a trial whose
    worker died, a folder for Tune's own files, and the total number of groups if a search is given only some."""

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
    `report` with `step` and `val_loss` after each validation, and returns its final figures, including `val_loss`, or
    `failed` with the reason. If nothing is stopped early, reports in quick succession are sent together. An exception
    counts as a lost worker: the trial is retried up to `max_retries` times, then marked as failed.

    If the group allows several trials `side_by_side`, `config` holds them as `side_by_side`, a list of {searched
    values, trial, folder}. `trial` then reports nothing and returns `side_by_side`: for each of them its figures and
    `history`, what it would have reported; or it returns `apart` if each must run alone. Early stopping is applied
    afterwards, where it would have stopped them one by one.
    """
    share = runtime.share
    halving = GroupedHalving(early_stopping, groups) if early_stopping else None
    search = GroupedSearch(groups, runtime, bar, on_trial, halving)
    if not search.missing:
        return

    quieten_tune()

    period = 0.0 if early_stopping else REPORT_SECONDS

    def run(config: dict[str, Any]) -> None:
        unsent: list[dict[str, Any]] = []
        sent = time.monotonic()

        def report(values: dict[str, Any]) -> None:
            nonlocal sent
            if time.monotonic() - sent < period:
                unsent.append(dict(values))
            else:
                tune.report({**values, EARLIER: list(unsent)})
                unsent.clear()
                sent = time.monotonic()

        try:
            figures = trial(config, report)
        except Exception as error:
            if (number := disk_errno(error)) is None:
                raise
            figures = {"disk_errno": number}  # ends the search without failing a trial
        tune.report({**NO_LOSS, **figures, EARLIER: unsent, "final": True})

    resources = {key.lower(): value for key, value in share.resources.items()}
    tuner = tune.Tuner(
        tune.with_resources(run, resources),
        tune_config=tune.TuneConfig(
            metric="val_loss",
            mode="min",
            search_alg=search,
            scheduler=halving or InOrder(),
            num_samples=-1,  # as many as the search proposes
            max_concurrent_trials=share.at_once,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(runtime.scratch),
            verbose=0,
            # Tune (2.60) can count a reused worker's death twice and give up its trial, so the search retries.
            failure_config=tune.FailureConfig(max_failures=0),
            checkpoint_config=tune.CheckpointConfig(),
            callbacks=[],
        ),
    )
    tuner.fit()
    if (number := search.disk_errno) is not None:
        raise OSError(number, DISK_ERRORS[number])


def _stop_on_disk_error(method: Callable[..., Any]) -> Callable[..., Any]:
    """Stops the search on a disk error, once the running trials have ended; Tune itself would print it and go on."""

    @wraps(method)
    def call(self: GroupedSearch, *arguments: Any, **options: Any) -> Any:
        try:
            return method(self, *arguments, **options)
        except Exception as error:
            if (number := disk_errno(error)) is None:
                raise
            self.disk_errno = number
            return None

    return call


class TrialResult(NamedTuple):
    """How a trial ended: its last figures, those of each validation, whether it ran to the end, and whether its worker
    died."""

    figures: dict[str, Any]
    history: list[dict[str, Any]]
    ended: bool
    error: bool

    def record(self) -> dict[str, Any]:
        """State, value, figures, history and reason, as in `result.json`."""
        figures = dict(self.figures)
        value, reason = figures.get("val_loss"), figures.pop("failed", None)
        if self.error or reason or value is None or not math.isfinite(value):
            state, reason = FAILED, reason or ("its worker died" if self.error else f"val_loss is {value}")
        else:
            state = COMPLETE if self.ended else STOPPED
        return {
            "state": state,
            "value": None if state == FAILED else value,
            "figures": figures,
            "history": self.history,
            "reason": reason,
        }


def figures_of(result: dict[str, Any]) -> dict[str, Any]:
    """The part of a Tune result that the trial itself reported."""
    return {key: value for key, value in result.items() if key not in _TUNE_KEYS and not key.startswith("config/")}


EARLIER = "earlier"
"""In a Tune result, the reports that are sent along with it."""
_TUNE_KEYS = {
    EARLIER,
    "timestamp", "time_this_iter_s", "time_total_s", "training_iteration", "pid", "hostname", "node_ip", "date",
    "trial_id", "time_since_restore", "iterations_since_restore", "done", "final", "checkpoint_dir_name",
    "should_checkpoint", "experiment_tag",
}  # fmt: skip


@dataclass
class _Running:
    """Trials of a group that run on one worker together; usually one."""

    group: Group
    trials: list[optuna.Trial | LostTrial]
    started: float
    history: list[dict[str, Any]] = field(default_factory=list)
    deaths: int = 0

    def config(self) -> dict[str, Any]:
        """What the trial function gets."""
        group, first = self.group, self.trials[0].number
        places = [
            {**trial.params, "trial": trial.number, "folder": str(group.folder / f"trial_{trial.number:04d}")}
            for trial in self.trials
        ]
        # The scheduler only knows the first trial, whose folder holds the checkpoint.
        config = (
            places[0] if len(places) == 1 else {"side_by_side": places, "trial": first, "folder": places[0]["folder"]}
        )
        return {**group.constants, **group.fixed, **config, "group": group.name}

    def __str__(self) -> str:
        numbers = ", ".join(str(trial.number) for trial in self.trials)
        return f"{self.group.name} trial{'s' * (len(self.trials) > 1)} {numbers}"


class GroupedSearch(Searcher):
    """Asks one Optuna study per group for its next trial; `GroupQueue` picks the group."""

    def __init__(
        self,
        groups: list[Group],
        runtime: Runtime,
        bar: Bar,
        on_trial: Callable[[Group, dict[str, Any]], None],
        halving: GroupedHalving | None = None,
    ) -> None:
        super().__init__(metric="val_loss", mode="min")
        self._groups = {group.name: group for group in groups}
        self._max_retries, self._bar, self._on_trial, self._halving = runtime.max_retries, bar, on_trial, halving
        self._studies = {group.name: Study(group, runtime.storage) for group in groups}
        left = {group.name: max(0, group.trials - self._studies[group.name].finished) for group in groups}
        reads = {group.name: group.reads for group in groups}
        self._queue = GroupQueue(left, reads, runtime.share.at_once, runtime.groups)
        self._running: dict[str, _Running] = {}
        self._retries: list[_Running] = []
        self.disk_errno: int | None = None
        """The errno of a disk error, after which no trial is started."""
        self.missing = sum(left.values())
        bar.start_at(sum(group.trials for group in groups) - self.missing)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        return True

    @_stop_on_disk_error
    def suggest(self, trial_id: str) -> Any:
        running = None if self.disk_errno is not None else self._next()
        if running is None:
            return None if self._running else Searcher.FINISHED
        self._running[trial_id] = running
        return running.config()

    def _next(self) -> _Running | None:
        """A trial to retry, else new ones, if any may start now."""
        for index, running in enumerate(self._retries):
            if self._queue.may_start(running.group.name):
                del self._retries[index]
                self._queue.restarted(running.group.name)
                return replace(running, started=time.time())
        name = self._queue.next_group(exclude={running.group.name for running in self._retries})
        if name is None:
            return None
        group, left = self._groups[name], self._queue.left[name]
        trials = self._studies[name].next_trials(min(group.side_by_side, left + 1))
        self._queue.started_together(name, len(trials) - 1)
        return _Running(group, trials, time.time())

    @_stop_on_disk_error
    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        running = self._running.get(trial_id)
        if running is None:
            return
        for report in (*result.get(EARLIER, ()), *(() if result.get("final") else (result,))):
            if "step" not in report or report["step"] in {entry["step"] for entry in running.history}:
                continue  # a retried trial reports its steps again
            running.history.append(figures_of(report))
            self._report(running, running.trials[0], report)
            self._bar.note(f"{running}: step {report['step']}, val_loss {report.get('val_loss', math.nan):.4g}")

    def _report(self, running: _Running, trial: optuna.Trial | LostTrial, figures: dict[str, Any]) -> None:
        if math.isfinite(figures.get("val_loss", math.nan)):
            self._studies[running.group.name].report(trial, figures["val_loss"], figures["step"])

    @_stop_on_disk_error
    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if result:
            self.on_trial_result(trial_id, result)
        running = self._running.pop(trial_id, None)
        if running is None:
            return
        self._queue.ended(running.group.name)
        figures = figures_of(result or {})
        side_by_side = len(running.trials) > 1
        if side_by_side and not figures.keys() & {"side_by_side", "disk_errno"}:  # retried alone, to find the culprit
            self._bar.line(f"{running}: {'their worker died' if error else 'too large side by side'}, now one by one")
            self._retries += [replace(running, trials=[trial], history=[]) for trial in running.trials]
            return
        if error and running.deaths < self._max_retries:
            deaths = running.deaths + 1
            self._retries.append(replace(running, deaths=deaths))
            self._bar.line(f"{running}: its worker died, trying again ({deaths} of {self._max_retries})")
            return
        if (number := figures.pop("disk_errno", None)) is not None:
            self.disk_errno = number
            return
        ended = bool(result and result.get("final"))
        if not side_by_side:
            self._end(running, running.trials[0], TrialResult(figures, running.history, ended, error))
            return
        for trial, outcome in zip(running.trials, figures["side_by_side"], strict=True):
            history = outcome.pop("history")
            end = TrialResult(NO_LOSS | outcome, history, ended, error)
            self._end(running, trial, self._replay_as_solo(running, trial, end))

    def _replay_as_solo(self, running: _Running, trial: optuna.Trial | LostTrial, end: TrialResult) -> TrialResult:
        """How a trial that ran side by side with others would have ended if they had run one by one. If it would have
        been stopped, its folder is deleted."""
        stop = self._halving.replay(running.group.name, trial.number, end.history) if self._halving else None
        history = end.history[:stop]
        for figures in history:
            self._report(running, trial, figures)
        if stop is None:
            return end
        shutil.rmtree(running.group.folder / f"trial_{trial.number:04d}", ignore_errors=True)
        return TrialResult(dict(history[-1]), history, False, False)

    def _end(self, running: _Running, trial: optuna.Trial | LostTrial, end: TrialResult) -> None:
        """Writes a trial's result file, then updates its study and the caller."""
        number, group = trial.number, running.group
        record = {
            **end.record(),
            "group": group.name,
            "trial": number,
            "params": {**group.fixed, **trial.params},
            "started": running.started,
            "seconds": (time.time() - running.started) / len(running.trials),
        }
        write_json(group.folder / f"trial_{number:04d}" / "result.json", record)
        self._studies[group.name].tell(trial, record)
        self._on_trial(group, record)
        self._bar.advance()

    def __deepcopy__(self, memo: dict) -> GroupedSearch:
        return self

    def __reduce__(self) -> tuple:
        """Tune pickles its configuration, which must not contain anything of this object, such as a database URL."""
        return (Searcher, ())

    def save(self, checkpoint_path: str) -> None:
        """Does nothing: studies and result files are the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Does nothing, like `save`."""


LOGGERS = [
    "ray.tune.execution.tune_controller",  # trials
    "ray.tune.execution.experiment_state",  # Tune's own state, written in the background and never read
    "ray.train._internal.storage",  # Tune's folders
]


def quieten_tune() -> None:
    """Removes from Tune's logs what the search reports in one line itself. Idempotent."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(is_news)
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # it lists every failed attempt as a failed trial


def is_news(record: logging.LogRecord) -> bool:
    """False for tracebacks of what the search reports in one line: a worker's death or a disk error."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or not (isinstance(error, RayActorError) or disk_errno(error) is not None)

"""Search over groups: one Optuna study and one early-stopping bracket a group, all trials in one Ray Tune pool.

In: groups (a space, a number of trials, constants) and a trial function. Out: `trial_NNNN/result.json` in each group's
folder and the trials of every group. Losses compare only inside a group, so groups share nothing but the machine; a
repeated call runs only the trials that are missing.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from jobs.addresses import without_secrets
from jobs.cluster import Share
from jobs.errors import RequestError
from jobs.progress import Bar
from jobs.workspace import read_json, write_json
from search_spaces.schema import Choice, Dimension, Range

optuna.logging.set_verbosity(optuna.logging.ERROR)

COMPLETE, STOPPED, FAILED = "COMPLETE", "STOPPED", "FAILED"
STARTUP_TRIALS = 4
"""Random trials of a study before TPE proposes."""


@dataclass(frozen=True)
class Group:
    """Trials whose losses compare. `constants` reach the trial function beside the searched values; `study` names the
    Optuna study, and changes with whatever makes earlier losses incomparable."""

    name: str
    folder: Path
    space: dict[str, Dimension]
    trials: int
    seed: int
    constants: dict[str, Any]
    study: str


@dataclass(frozen=True)
class EarlyStopping:
    """Asynchronous successive halving (arXiv 1810.05934); `grace` and `longest` count validations."""

    grace: int
    longest: int
    reduction_factor: int


def run_search(
    groups: list[Group],
    trial: Callable[[dict[str, Any], Callable[[dict[str, Any]], None]], dict[str, Any]],
    *,
    storage: optuna.storages.BaseStorage,
    share: Share,
    max_retries: int,
    early_stopping: EarlyStopping | None,
    scratch: Path,
    bar: Bar,
    on_trial: Callable[[Group, dict[str, Any]], None] = lambda group, result: None,
) -> None:
    """Runs what is missing of every group's trials.

    `trial(config, report)` gets the constants, the searched values, `trial` (its number) and `folder`; it calls
    `report` with `step` and `val_loss` after each validation and returns the figures of its result, `val_loss` among
    them, or `failed` with the reason. An exception is a lost worker: the trial is tried again, then it failed too.
    """
    search = GroupedSearch(groups, storage, bar, on_trial)
    if not search.missing:
        return
    scheduler = _GroupedHalving(early_stopping) if early_stopping else FIFOScheduler()

    def run(config: dict[str, Any]) -> None:
        figures = trial(config, lambda values: tune.report(dict(values)))
        tune.report({"val_loss": math.inf, **figures, "final": True})

    resources = {key.lower(): value for key, value in share.resources.items()}
    tuner = tune.Tuner(
        tune.with_resources(run, resources),
        tune_config=tune.TuneConfig(
            metric="val_loss",
            mode="min",
            search_alg=search,
            scheduler=scheduler,
            num_samples=search.missing,
            max_concurrent_trials=share.at_once,
            reuse_actors=True,
            trial_dirname_creator=lambda one: one.trial_id,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=str(scratch),
            verbose=0,
            failure_config=tune.FailureConfig(max_failures=max_retries),
            checkpoint_config=tune.CheckpointConfig(),
            callbacks=[],
        ),
    )
    tuner.fit()


def trials_of(group: Group) -> list[dict[str, Any]]:
    """The finished trials of a group, by number."""
    found = [read_json(path) for path in sorted(group.folder.glob("trial_*/result.json"))]
    return [result for result in found if result is not None]


def best_of(results: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The trial of lowest value among those that ran to their end."""
    finished = [result for result in results if result["state"] == COMPLETE]
    return min(finished, key=lambda result: (result["value"], result["trial"]), default=None)


def open_storage(url: str | None, root: Path) -> optuna.storages.BaseStorage:
    """The study storage: a database URL, or a journal file under `root`/optuna."""
    if url:
        try:
            return optuna.storages.RDBStorage(url)
        except Exception as error:  # each database driver raises its own
            shown = without_secrets(f"{url} cannot be opened ({type(error).__name__}: {error})")
            raise RequestError("storage.optuna_url: " + " ".join(shown.split())[:300]) from None
    path = root / "optuna" / "journal.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return optuna.storages.JournalStorage(JournalFileBackend(str(path)))


def forget_studies(storage: optuna.storages.BaseStorage, sweep: str) -> None:
    """Deletes every study of a sweep that starts over."""
    for name in optuna.get_all_study_names(storage):
        if name.startswith(f"{sweep}/"):
            optuna.delete_study(study_name=name, storage=storage)


@dataclass
class _Running:
    group: Group
    trial: optuna.Trial
    started: float
    history: list[dict[str, Any]] = field(default_factory=list)


class GroupedSearch(Searcher):
    """Asks one Optuna study a group, the group with the fewest trials begun first."""

    def __init__(
        self,
        groups: list[Group],
        storage: optuna.storages.BaseStorage,
        bar: Bar,
        on_trial: Callable[[Group, dict[str, Any]], None],
    ) -> None:
        super().__init__(metric="val_loss", mode="min")
        self._groups = {group.name: group for group in groups}
        self._bar, self._on_trial = bar, on_trial
        self._studies = {group.name: _study(group, storage) for group in groups}
        self._left = {group.name: max(0, group.trials - _settle(self._studies[group.name], group)) for group in groups}
        self._running: dict[str, _Running] = {}
        self.missing = sum(self._left.values())
        bar.update(sum(group.trials for group in groups) - self.missing)

    def set_search_properties(self, metric: str | None, mode: str | None, config: dict, **spec: Any) -> bool:
        return True

    def suggest(self, trial_id: str) -> Any:
        name = max(self._left, key=lambda name: self._left[name])
        if not self._left[name]:
            return Searcher.FINISHED
        self._left[name] -= 1
        group = self._groups[name]
        asked = self._studies[name].ask(
            {key: _distribution(one) for key, one in group.space.items() if isinstance(one, Range | Choice)}
        )
        self._running[trial_id] = _Running(group, asked, time.time())
        folder = group.folder / f"trial_{asked.number:04d}"
        return {
            **group.constants,
            **_fixed(group),
            **asked.params,
            "group": name,
            "trial": asked.number,
            "folder": str(folder),
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        running = self._running.get(trial_id)
        if running is None or result.get("final") or "step" not in result:
            return
        seen = {entry["step"] for entry in running.history}
        if result["step"] in seen:  # a retried trial reports its steps again
            return
        running.history.append(_figures(result))
        if math.isfinite(result.get("val_loss", math.nan)):
            running.trial.report(result["val_loss"], result["step"])
        self._bar.note(
            f"{running.group.name} trial {running.trial.number}: step {result['step']}, "
            f"val_loss {result.get('val_loss', math.nan):.4g}"
        )

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        if result:
            self.on_trial_result(trial_id, result)
        running = self._running.pop(trial_id, None)
        if running is None:
            return
        figures = _figures(result or {})
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
            "params": {**_fixed(running.group), **running.trial.params},
            "figures": figures,
            "history": running.history,
            "started": running.started,
            "seconds": time.time() - running.started,
            "reason": reason,
        }
        write_json(running.group.folder / f"trial_{running.trial.number:04d}" / "result.json", record)
        _tell(self._studies[running.group.name], running.trial, record)
        self._on_trial(running.group, record)
        self._bar.advance()

    def __deepcopy__(self, memo: dict) -> GroupedSearch:
        return self

    def __reduce__(self) -> tuple:
        """Tune snapshots its configuration by pickle; nothing of this object, such as a database URL, belongs there."""
        return (Searcher, ())

    def save(self, checkpoint_path: str) -> None:
        """Nothing: studies and result files are the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing, as `save`."""


class _GroupedHalving(FIFOScheduler):
    """One AsyncHyperBandScheduler a group."""

    def __init__(self, settings: EarlyStopping) -> None:
        super().__init__()
        self._settings = settings
        self._brackets: dict[str, AsyncHyperBandScheduler] = {}

    def _bracket(self, trial: Any) -> AsyncHyperBandScheduler:
        name = trial.config["group"]
        if name not in self._brackets:
            self._brackets[name] = AsyncHyperBandScheduler(
                time_attr="training_iteration",
                metric="val_loss",
                mode="min",
                # One less than the longest run: a rung at a trial's end would stop nothing but its good name.
                max_t=max(self._settings.longest - 1, self._settings.grace),
                grace_period=self._settings.grace,
                reduction_factor=self._settings.reduction_factor,
                stop_last_trials=False,
            )
        return self._brackets[name]

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        self._bracket(trial).on_trial_add(tune_controller, trial)

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        if result.get("final"):
            return TrialScheduler.CONTINUE
        return self._bracket(trial).on_trial_result(tune_controller, trial, result)

    def on_trial_complete(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> None:
        self._bracket(trial).on_trial_complete(tune_controller, trial, result)

    def on_trial_remove(self, tune_controller: Any, trial: Any) -> None:
        self._bracket(trial).on_trial_remove(tune_controller, trial)


def _study(group: Group, storage: optuna.storages.BaseStorage) -> optuna.Study:
    study = optuna.create_study(study_name=group.study, storage=storage, direction="minimize", load_if_exists=True)
    begun = len(study.get_trials(deepcopy=False))
    # A restarted study must not propose its first random points again.
    seed = (group.seed * 1_000_003 + begun * 7919) % 2**31
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
    return study


def _settle(study: optuna.Study, group: Group) -> int:
    """Brings the study in line with the result files; returns how many trials of the group are finished.

    A trial that was running when the driver died is told as failed and its values are put first in the queue. A failed
    trial is not finished: another one takes its place.
    """
    results = {result["trial"]: result for result in trials_of(group)}
    for frozen in study.get_trials(deepcopy=False):
        if frozen.state != optuna.trial.TrialState.RUNNING:
            continue
        if frozen.number in results:
            _tell(study, frozen.number, results[frozen.number])
        else:
            study.tell(frozen.number, state=optuna.trial.TrialState.FAIL)
            study.enqueue_trial(frozen.params)
    return sum(result["state"] != FAILED for result in results.values())


def _tell(study: optuna.Study, trial: optuna.Trial | int, record: dict[str, Any]) -> None:
    if record["state"] == COMPLETE:
        study.tell(trial, record["value"])
    elif record["state"] == STOPPED:
        study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    else:
        study.tell(trial, state=optuna.trial.TrialState.FAIL)


def _distribution(dimension: Range | Choice) -> optuna.distributions.BaseDistribution:
    if isinstance(dimension, Choice):
        return optuna.distributions.CategoricalDistribution(dimension.choice)
    if isinstance(dimension.low, int) and isinstance(dimension.high, int):
        return optuna.distributions.IntDistribution(dimension.low, dimension.high, log=dimension.log)
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)


def _fixed(group: Group) -> dict[str, Any]:
    return {key: one for key, one in group.space.items() if not isinstance(one, Range | Choice)}


_TUNE_KEYS = {
    "timestamp", "time_this_iter_s", "time_total_s", "training_iteration", "pid", "hostname", "node_ip", "date",
    "trial_id", "time_since_restore", "iterations_since_restore", "done", "final", "checkpoint_dir_name",
    "should_checkpoint", "experiment_tag",
}  # fmt: skip


def _figures(result: dict[str, Any]) -> dict[str, Any]:
    """What the trial itself reported."""
    return {key: value for key, value in result.items() if key not in _TUNE_KEYS and not key.startswith("config/")}

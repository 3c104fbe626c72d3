"""Groups of trials with comparable losses, and the Optuna study of each.

In: a group (a space, a number of trials, constants, a sampler) and an Optuna storage. Out: proposals by trial number,
and a study that agrees with the result files. The files are authoritative: a study left out of date by a kill is
repaired from them.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from jobs.files import read_json
from jobs.search.databases import open_database
from search_spaces.dimensions import Choice, Dimension, Range

optuna.logging.set_verbosity(optuna.logging.ERROR)

Storage = optuna.storages.BaseStorage
COMPLETE, STOPPED, FAILED = "COMPLETE", "STOPPED", "FAILED"
STARTUP_TRIALS = 4
"""Number of random trials before the sampler learns from results."""
CUT_CHECKS = 5
"""How often to check the end of a journal before calling it truncated."""
WARM_STARTS = 3
"""Number of an earlier study's best trials that a new one tries first."""


@dataclass(frozen=True)
class Group:
    """Trials with comparable losses. `constants` are passed to the trial function with the searched values; `study` is
    the name of the Optuna study, which changes whenever earlier losses become incomparable.

    `objectives` are the figures that the study minimises; with more than one, nothing is stopped early. `warm_start` is
    a name prefix of earlier studies whose best values are tried first. `reads` names the data that the trials read: a
    worker that has it cached prefers trials, of any group, that read the same. `side_by_side` is the most trials passed
    to one call of the trial function, as long as none of their values depends on another's result.
    """

    name: str
    folder: Path
    space: dict[str, Dimension]
    trials: int
    seed: int
    constants: dict[str, Any]
    study: str
    sampler: str = "tpe"
    objectives: tuple[str, ...] = ("val_loss",)
    warm_start: str | None = None
    reads: str = ""
    side_by_side: int = 1

    @property
    def searched(self) -> dict[str, Range | Choice]:
        return {key: dimension for key, dimension in self.space.items() if isinstance(dimension, Range | Choice)}

    @property
    def fixed(self) -> dict[str, Any]:
        return {key: value for key, value in self.space.items() if not isinstance(value, Range | Choice)}


def trials_of(group: Group) -> list[dict[str, Any]]:
    """The finished trials of a group, by number."""
    results = [read_json(path) for path in sorted(group.folder.glob("trial_*/result.json"))]
    return [result for result in results if result is not None]


def missing_trials(group: Group) -> int:
    """Number of a group's trials that have no result yet, or failed."""
    return max(0, group.trials - sum(result["state"] != FAILED for result in trials_of(group)))


def best_of(results: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """The trial with the lowest value among those that ran to the end."""
    finished = [result for result in results if result["state"] == COMPLETE]
    return min(finished, key=lambda result: (result["value"], result["trial"]), default=None)


def pareto_front(results: Iterable[dict[str, Any]], objectives: tuple[str, ...]) -> set[int]:
    """Numbers of the finished trials on the Pareto front: no other trial is as good in every objective and better in
    one."""
    finished = {
        result["trial"]: [result["figures"][name] for name in objectives]
        for result in results
        if result["state"] == COMPLETE
    }

    def is_dominated(values: list[float]) -> bool:
        return any(
            other != values and all(theirs <= mine for theirs, mine in zip(other, values, strict=True))
            for other in finished.values()
        )

    return {number for number, values in finished.items() if not is_dominated(values)}


def open_storage(url: str | None, root: Path) -> Storage:
    """The study storage: a database URL, or a journal file under `root`/optuna."""
    if url:
        return open_database(url)
    path = root / "optuna" / "journal.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    return optuna.storages.JournalStorage(JournalFileBackend(str(path)))


def journal_problem(path: Path) -> str | None:
    """Why a journal file cannot be opened or appended to (a truncated line corrupts the next one); None if sound."""
    try:
        optuna.get_all_study_names(optuna.storages.JournalStorage(JournalFileBackend(str(path))))
        for _ in range(CUT_CHECKS):
            with path.open("rb") as file:
                file.seek(-min(1, path.stat().st_size), os.SEEK_END)
                if file.read() in (b"\n", b""):
                    return None
            time.sleep(0.1)  # another process may be writing
    except Exception as error:  # Optuna has no class of its own for a damaged journal
        return f"cannot be opened ({type(error).__name__})"
    return "ends in the middle of a line"


def forget_studies(storage: Storage, sweep: str) -> None:
    """Deletes all studies of a sweep that starts over."""
    for name in optuna.get_all_study_names(storage):
        if name.startswith(f"{sweep}/"):
            optuna.delete_study(study_name=name, storage=storage)


def studied_sweeps(storage: Storage, stage: str) -> set[str]:
    """Names of the sweeps that have a study of a stage, such as `lora`."""
    names = (name.partition("/") for name in optuna.get_all_study_names(storage))
    return {sweep for sweep, _, rest in names if re.split("[/@]", rest)[0] == stage}


@dataclass(frozen=True)
class LostTrial:
    """A finished trial whose result file is missing; it is run again under its own number."""

    number: int
    params: dict[str, Any]


class Study:
    """One group's Optuna study, opened and synchronised with the result files.

    `finished` counts the trials that need no replacement; `unfinished` lists those that were running when an earlier
    driver died and those whose files are gone, to be run under their own numbers.
    """

    def __init__(self, group: Group, storage: Storage) -> None:
        self._group = group
        self._study = optuna.create_study(
            study_name=group.study,
            storage=storage,
            directions=["minimize"] * len(group.objectives),
            load_if_exists=True,
        )
        results = {result["trial"]: result for result in trials_of(group)}
        for number in range(len(self._study.get_trials(deepcopy=False)), max(results, default=-1) + 1):
            if number in results:
                self._study.add_trial(_trial_from_record(group, results[number]))  # the files outlived the storage
            else:
                self.ask()  # draws the same values that this number had
        self.unfinished: list[optuna.Trial | LostTrial] = []
        for frozen in self._study.get_trials(deepcopy=False, states=_OPEN):
            if frozen.state != TrialState.RUNNING:
                if frozen.number not in results:
                    self.unfinished.append(LostTrial(frozen.number, frozen.params))
            elif frozen.number in results:
                self.tell(frozen.number, results[frozen.number])
            elif set(frozen.params) == set(group.searched):
                self.unfinished.append(optuna.Trial(self._study, frozen._trial_id))
            else:  # the driver died while this trial's values were being drawn
                self._study.tell(frozen.number, state=TrialState.FAIL)
        self.finished = sum(result["state"] != FAILED for result in results.values())
        room = max(0, group.trials - self.finished)  # the settings may ask for fewer trials than before
        for surplus in self.unfinished[room:]:
            if not isinstance(surplus, LostTrial):
                self._study.tell(surplus, state=TrialState.FAIL)
        del self.unfinished[room:]
        if group.warm_start and not self._study.get_trials(deepcopy=False):
            for params in _best_values(group, storage):
                self._study.enqueue_trial(params)

    def next_trials(self, limit: int) -> list[optuna.Trial | LostTrial]:
        """The next trial and, up to `limit` in all, those after it whose values do not depend on its result."""
        trials, self.unfinished = self.unfinished[:limit], self.unfinished[limit:]
        learns = self._group.sampler not in ("random", "grid")
        while len(trials) < limit:
            if trials and learns and len(self._study.get_trials(deepcopy=False, states=_OPEN)) >= STARTUP_TRIALS:
                break
            trials.append(self.ask())
        return trials

    def ask(self) -> optuna.Trial:
        """The next trial. Its values depend on the group's seed, the number of trials started and the finished ones,
        not on how often the driver was restarted."""
        started = self._study.get_trials(deepcopy=False, states=_STARTED)
        number = sum(set(trial.params) == set(self._group.searched) for trial in started)
        self._study.sampler = _sampler(self._group, (self._group.seed * 1_000_003 + number * 7919) % 2**31)
        return self._study.ask({name: _distribution(dimension) for name, dimension in self._group.searched.items()})

    def report(self, trial: optuna.Trial | LostTrial, value: float, step: int) -> None:
        """Reports an intermediate value, unless the study has several objectives."""
        if len(self._group.objectives) == 1 and not isinstance(trial, LostTrial):
            trial.report(value, step)

    def tell(self, trial: optuna.Trial | LostTrial | int, record: dict[str, Any]) -> None:
        """Tells Optuna how a trial ended; a `LostTrial` has been told already."""
        if isinstance(trial, LostTrial):
            return
        if record["state"] == COMPLETE:
            figures = {**record["figures"], "val_loss": record["value"]}
            self._study.tell(trial, [figures[name] for name in self._group.objectives])
        elif record["state"] == STOPPED:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, state=TrialState.FAIL)


def _trial_from_record(group: Group, record: dict[str, Any]) -> optuna.trial.FrozenTrial:
    """A trial rebuilt from its result file."""
    values = None
    if record["state"] == COMPLETE:
        figures = {**record["figures"], "val_loss": record["value"]}
        values = [figures[name] for name in group.objectives]
    elif record["state"] == STOPPED:
        values = [record["value"]]
    return optuna.trial.create_trial(
        state={COMPLETE: TrialState.COMPLETE, STOPPED: TrialState.PRUNED, FAILED: TrialState.FAIL}[record["state"]],
        values=values,
        params={name: record["params"][name] for name in group.searched},
        distributions={name: _distribution(dimension) for name, dimension in group.searched.items()},
        intermediate_values={
            entry["step"]: entry["val_loss"]
            for entry in record["history"]
            if len(group.objectives) == 1 and math.isfinite(entry.get("val_loss", math.nan))
        },
    )


_OPEN = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
_STARTED = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL)


class _Grid(optuna.samplers.GridSampler):
    """Optuna's own stops `Study.optimize` after the last combination, which raises under plain `ask` and `tell`."""

    def after_trial(self, study: optuna.Study, trial: Any, state: TrialState, values: Any) -> None:
        """Does nothing: the group knows how many trials it has."""


def _sampler(group: Group, seed: int) -> optuna.samplers.BaseSampler:
    if group.sampler == "random":
        return optuna.samplers.RandomSampler(seed=seed)
    if group.sampler == "gp":
        return optuna.samplers.GPSampler(seed=seed, n_startup_trials=STARTUP_TRIALS)
    if group.sampler == "grid":
        grid = {
            name: list(dimension.choice) for name, dimension in group.searched.items() if isinstance(dimension, Choice)
        }
        return _Grid(grid, seed=group.seed)
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP_TRIALS)


def _best_values(group: Group, storage: Storage) -> list[dict[str, Any]]:
    """Searched values of the best trials in this group's earlier studies, without those outside this space."""
    trials = []
    for name in optuna.get_all_study_names(storage):
        if name.startswith(f"{group.warm_start}@"):
            earlier = optuna.load_study(study_name=name, storage=storage)
            completed = earlier.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            trials += [(trial.values[0], trial.params) for trial in completed]
    trials.sort(key=lambda trial: trial[0])
    return [
        {
            name: params[name]
            for name, dimension in group.searched.items()
            if name in params and _contains(dimension, params[name])
        }
        for _, params in trials[:WARM_STARTS]
    ]


def _contains(dimension: Range | Choice, value: Any) -> bool:
    distribution = _distribution(dimension)
    try:
        return distribution._contains(distribution.to_internal_repr(value))
    except ValueError:
        return False


def _distribution(dimension: Range | Choice) -> optuna.distributions.BaseDistribution:
    if isinstance(dimension, Choice):
        return optuna.distributions.CategoricalDistribution(dimension.choice)
    if isinstance(dimension.low, int) and isinstance(dimension.high, int):
        return optuna.distributions.IntDistribution(dimension.low, dimension.high, log=dimension.log)
    return optuna.distributions.FloatDistribution(dimension.low, dimension.high, log=dimension.log)

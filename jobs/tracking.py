"""MLflow tracking: one writer, on the driver, that brings the store in line with the results on disk.

In: records of stages, trials and cells, each with a key of its own. Out: a tree of runs, sweep -> stage -> trial or
cell. A record that is tracked already is left alone, so a repeated sweep adds nothing; a store that does not answer is
reported once and does not stop the sweep, because the results on disk can be tracked later.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from jobs.addresses import without_secrets
from jobs.errors import RequestError

KEY_TAG = "deltascope.key"
BATCH = 1000
PARAM_CHARACTERS = 500


def _guarded(method: Callable[..., None]) -> Callable[..., None]:
    """A store that stops answering is said once and then left alone: the results are on disk."""

    @wraps(method)
    def call(self: Tracker, *arguments: Any, **options: Any) -> None:
        if self.lost:
            return
        try:
            method(self, *arguments, **options)
        except (MlflowException, OSError, SQLAlchemyError) as error:
            self.lost = True
            self._say(f"  MLflow stopped answering ({_short(error)}); nothing is lost: `python -m jobs track` sends it")

    return call


class Tracker:
    """Runs of one experiment, found by their key."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        artifacts: Path,
        scope: str = "",
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Opens the store (creating it); raises RequestError where the address does not answer.

        `scope` tells one start from nothing from the next: runs of another scope are left alone.
        """
        self.lost = False
        self._scope, self._say = scope, say
        try:
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(experiment)
            if found is None:
                location = (artifacts / experiment).resolve().as_uri() if uri.startswith("sqlite") else None
                self.experiment = self._client.create_experiment(experiment, artifact_location=location)
            else:
                self.experiment = found.experiment_id
                if found.lifecycle_stage == "deleted":
                    self._client.restore_experiment(self.experiment)
            self._runs = dict(self._known())
        except Exception as error:
            raise RequestError(
                f"storage.tracking_uri: {without_secrets(uri)} does not answer ({_short(error)})"
            ) from None

    def _known(self) -> Iterable[tuple[str, str]]:
        token = None
        while True:
            page = self._client.search_runs([self.experiment], max_results=1000, page_token=token)
            for run in page:
                key, _, scope = run.data.tags.get(KEY_TAG, "").rpartition("#")
                if key and scope == self._scope:
                    yield key, run.info.run_id
            token = page.token
            if not token:
                return

    @_guarded
    def open(self, key: str, name: str, parent: str | None = None, params: dict[str, Any] | None = None) -> None:
        """The run of `key` is RUNNING, created RUNNING under the run of key `parent` if there is none."""
        if key not in self._runs:
            tags = {KEY_TAG: f"{key}#{self._scope}", "mlflow.runName": name}
            if parent is not None:
                tags["mlflow.parentRunId"] = self._runs[parent]
            run = self._client.create_run(self.experiment, tags=tags, run_name=name)
            if params:
                self._batch(run.info.run_id, params=_params(params))
            self._runs[key] = run.info.run_id
        else:
            self._client.update_run(self._runs[key], status="RUNNING")

    def is_finished(self, key: str) -> bool:
        """Whether there is a run of `key` that has ended well."""
        try:
            return key in self._runs and self._client.get_run(self._runs[key]).info.status == "FINISHED"
        except (MlflowException, OSError, SQLAlchemyError):
            return False  # whatever is sent next says so

    @_guarded
    def log(self, key: str, metrics: dict[str, Any]) -> None:
        """Metrics of a run that is open."""
        self._batch(self._runs[key], metrics=_metrics(metrics, 0))

    @_guarded
    def close(self, key: str, metrics: dict[str, Any] | None = None, status: str = "FINISHED") -> None:
        if metrics:
            self.log(key, metrics)
        self._client.set_terminated(self._runs[key], status=status)

    @_guarded
    def record(
        self,
        key: str,
        name: str,
        parent: str,
        *,
        params: dict[str, Any],
        metrics: dict[str, Any],
        history: Iterable[dict[str, Any]] = (),
        status: str = "FINISHED",
        started: float | None = None,
        seconds: float = 0.0,
    ) -> None:
        """One finished trial or cell as one run; `history` entries carry a `step`."""
        if key in self._runs:
            return
        begin = time.time() - seconds if started is None else started
        tags = {KEY_TAG: f"{key}#{self._scope}", "mlflow.runName": name, "mlflow.parentRunId": self._runs[parent]}
        run = self._client.create_run(self.experiment, start_time=int(begin * 1000), tags=tags, run_name=name)
        points = [metric for entry in history for metric in _metrics(entry, entry["step"])]
        last = max((entry["step"] for entry in history), default=0)
        self._batch(run.info.run_id, metrics=[*points, *_metrics(metrics, last)], params=_params(params))
        self._client.set_terminated(run.info.run_id, status=status, end_time=int((begin + seconds) * 1000))
        self._runs[key] = run.info.run_id

    @_guarded
    def artifacts(self, key: str, folder: Path, below: str | None = None) -> None:
        """Uploads a folder of tables and figures to the run of `key`."""
        self._client.log_artifacts(self._runs[key], str(folder), below)

    @_guarded
    def sweep_orphans(self) -> None:
        """What a driver that died left RUNNING: stages are marked KILLED and reopened when needed; a trial or cell that
        was being written is deleted and written again."""
        for run in self._client.search_runs([self.experiment], "attributes.status = 'RUNNING'", max_results=1000):
            key = run.data.tags.get(KEY_TAG, "").rpartition("#")[0]
            if "/" in key:
                self._client.delete_run(run.info.run_id)
                self._runs.pop(key, None)
            else:
                self._client.set_terminated(run.info.run_id, status="KILLED")

    def _batch(self, run: str, metrics: list[Metric] | None = None, params: list[Param] | None = None) -> None:
        metrics = list({(metric.key, metric.step): metric for metric in metrics or []}.values())
        for start in range(0, max(len(metrics), 1), BATCH):
            self._client.log_batch(
                run, metrics=metrics[start : start + BATCH], params=(params or []) if start == 0 else [], tags=[]
            )


def _metrics(values: dict[str, Any], step: int) -> list[Metric]:
    now = int(time.time() * 1000)
    return [
        Metric(key, float(value), now, int(step))
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and key != "step"
    ]


def _params(values: dict[str, Any]) -> list[Param]:
    return [Param(key, str(value)[:PARAM_CHARACTERS]) for key, value in values.items() if value is not None]


def _short(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return without_secrets(first)[:200]

"""MLflow tracking: a single writer thread in the driver that keeps the store in line with the results on disk.

In: records of stages, trials and cells, each with its own key. Out: a tree of runs, sweep -> stage -> trial or cell.
Records that are already tracked are left alone, so a repeated sweep adds nothing. An unreachable store delays nothing:
what it missed is sent when it is back, or later from the results on disk.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from pathlib import Path
from typing import Any

import requests
from mlflow import MlflowClient
from mlflow.entities import Metric, Param, Run
from mlflow.exceptions import MlflowException
from sqlalchemy.exc import SQLAlchemyError

from jobs.errors import RequestError, public_line, without_secrets
from jobs.tracking.opening_view import TAGS

KEY_TAG = "deltascope.key"
BATCH = 1000
PARAM_CHARACTERS = 500
LONGEST_WAIT = 30.0
"""Maximum seconds between two attempts to reach a server that is down; the first wait is two seconds."""
ANSWER_SECONDS = 3.0


def _queued(method: Callable[..., None]) -> Callable[..., None]:
    """The caller continues at once; the writer makes the calls in order."""

    @wraps(method)
    def call(self: Tracker, *arguments: Any, **options: Any) -> None:
        self._calls.put(partial(method, self, *arguments, **options))
        if self._writer is None:
            self._writer = threading.Thread(target=self._write, name="mlflow writer", daemon=True)
            self._writer.start()

    return call


@dataclass(frozen=True)
class Record:
    """A finished trial or cell: its key, name, parent run's key, and what to log. Each `history` entry has a `step`."""

    key: str
    name: str
    parent: str
    params: dict[str, Any]
    metrics: dict[str, Any]
    history: Sequence[dict[str, Any]] = ()
    status: str = "FINISHED"
    started: float | None = None
    seconds: float = 0.0


class Tracker:
    """The runs of one experiment, by key.

    After `finish`, `lost` says whether the server is down and missed something, and `refused` how many calls it
    rejected.
    """

    def __init__(
        self,
        uri: str,
        experiment: str,
        artifacts: Path,
        scope: str = "",
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        """Opens the store, creating it if needed; raises RequestError if the address does not answer.

        `scope` identifies this start of the sweep: runs of earlier starts have another scope and are left alone.
        """
        self.lost = False
        self.refused = 0
        self._uri, self._scope, self._say = uri, scope, say
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._writer: threading.Thread | None = None
        self._finishing = threading.Event()
        logging.getLogger("mlflow.store").setLevel(logging.CRITICAL)  # it also prints what it raises
        try:
            self._client = MlflowClient(tracking_uri=uri)
            found = self._client.get_experiment_by_name(experiment)
            if found is None:
                location = (artifacts / experiment).resolve().as_uri() if uri.startswith("sqlite") else None
                self.experiment = self._client.create_experiment(
                    experiment, artifact_location=location, tags=dict(TAGS)
                )
            else:
                self.experiment = found.experiment_id
                if found.lifecycle_stage == "deleted":
                    self._client.restore_experiment(self.experiment)
                for name, value in TAGS.items():
                    if found.tags.get(name) != value:
                        self._client.set_experiment_tag(self.experiment, name, value)
            self._runs = {key: run.info.run_id for key, run in self._tracked_runs()}
        except Exception as error:
            raise RequestError(
                f"storage.tracking_uri: {without_secrets(uri)} does not answer ({public_line(error)})"
            ) from None

    def finish(self) -> None:
        """Waits until everything is sent. A server that is down is tried once more."""
        if self._writer is not None:
            self._finishing.set()
            self._calls.put(None)
            self._writer.join()
            self._writer = None
            self._finishing.clear()

    def _write(self) -> None:
        while (call := self._calls.get()) is not None:
            if not self.lost:
                self._make(call)

    def _make(self, call: Callable[[], None]) -> None:
        """Repeats a call until it succeeds, because later calls depend on it, as a trial on its stage."""
        tries = 0
        while True:
            last = tries > 0 and self._finishing.is_set()
            try:
                if tries:
                    self._check_answers()
                    self._reload_runs()
                call()
            except Exception as error:  # a failed call must not end the writer
                if not _is_transient(error):
                    self._refuse(error)
                    return
                if last:
                    self.lost = True
                    return
                if not tries:
                    self._say(
                        f"  MLflow stopped answering ({public_line(error)}); what it misses is sent once it is back"
                    )
            else:
                if tries:
                    self._say("  MLflow is answering again; sending what it missed")
                return
            tries += 1
            self._finishing.wait(min(2.0 ** min(tries, 10), LONGEST_WAIT))

    def _refuse(self, error: Exception) -> None:
        if not self.refused:
            self._say(f"  MLflow rejected a call: {public_line(error)}")
        self.refused += 1

    def _check_answers(self) -> None:
        """Raises within seconds if the server hangs; MLflow's own timeout allows for slow answers."""
        if self._uri.startswith("http"):
            with contextlib.suppress(requests.exceptions.SSLError):  # an answer, too; MLflow has its own certificates
                requests.get(f"{self._uri.rstrip('/')}/health", timeout=ANSWER_SECONDS)

    def _reload_runs(self) -> None:
        """Reads which runs the server has; deletes half-written trials and cells."""
        self._runs = {}
        for key, run in self._tracked_runs():
            if "/" in key and run.info.status == "RUNNING":
                self._client.delete_run(run.info.run_id)
            else:
                self._runs[key] = run.info.run_id

    def _tracked_runs(self) -> Iterable[tuple[str, Run]]:
        for run in all_runs(self._client, self.experiment):
            key, scope = key_and_scope(run)
            if key and scope == self._scope:
                yield key, run

    @_queued
    def open(self, key: str, name: str, parent: str | None = None, params: dict[str, Any] | None = None) -> None:
        """Marks the run of `key` as RUNNING; if there is none, creates it under the run of key `parent`.

        An existing run keeps its parameters, which MLflow does not let us change.
        """
        have: dict[str, str] = {}
        if key not in self._runs:
            tags = {KEY_TAG: f"{key}#{self._scope}", "mlflow.runName": name}
            if parent is not None:
                tags["mlflow.parentRunId"] = self._runs[parent]
            self._runs[key] = self._client.create_run(self.experiment, tags=tags, run_name=name).info.run_id
        else:
            have = self._client.get_run(self._runs[key]).data.params
            self._client.update_run(self._runs[key], status="RUNNING")
        given = _params(params or {})
        if missing := [param for param in given if param.key not in have]:
            self._batch(self._runs[key], params=missing)
        changed = [param for param in given if have.get(param.key, param.value) != param.value]
        if changed:
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            first = changed[0]
            self._say(
                f"  MLflow cannot change {first.key} of the run {key} from {have[first.key]} to {first.value}{more}; "
                "give the sweep another name to have both"
            )

    def is_finished(self, key: str) -> bool:
        """Whether the run of `key` exists and ended successfully."""
        try:
            return key in self._runs and self._client.get_run(self._runs[key]).info.status == "FINISHED"
        except (MlflowException, OSError, SQLAlchemyError):
            return False  # the next call will report the error

    @_queued
    def log(self, key: str, metrics: dict[str, Any]) -> None:
        """Logs metrics to an open run."""
        self._log(key, metrics)

    @_queued
    def close(self, key: str, metrics: dict[str, Any] | None = None, status: str = "FINISHED") -> None:
        """Ends an open run."""
        if metrics:
            self._log(key, metrics)
        self._client.set_terminated(self._runs[key], status=status)

    @_queued
    def record(self, record: Record) -> None:
        """Writes a finished trial or cell as a run."""
        if record.key in self._runs:
            return
        begin = time.time() - record.seconds if record.started is None else record.started
        tags = {
            KEY_TAG: f"{record.key}#{self._scope}",
            "mlflow.runName": record.name,
            "mlflow.parentRunId": self._runs[record.parent],
        }
        run = self._client.create_run(self.experiment, start_time=int(begin * 1000), tags=tags, run_name=record.name)
        points = [metric for entry in record.history for metric in _metrics(entry, entry["step"])]
        last = max((entry["step"] for entry in record.history), default=0)
        ends = {point.key: point.value for point in points if point.step == last}
        # A best value comes one step after the last point of its curve, which it must not replace.
        summary = [
            _at(metric, last + (ends.get(metric.key, metric.value) != metric.value))
            for metric in _metrics(record.metrics, last)
        ]
        metrics = [*points, *summary]
        self._batch(run.info.run_id, metrics=metrics, params=_params(record.params))
        end = int((begin + record.seconds) * 1000)
        self._client.set_terminated(run.info.run_id, status=record.status, end_time=end)
        self._runs[record.key] = run.info.run_id

    @_queued
    def artifacts(self, key: str, folder: Path, subfolder: str | None = None) -> None:
        """Uploads a folder of tables and figures to the run of `key`."""
        self._client.log_artifacts(self._runs[key], str(folder), subfolder)

    @_queued
    def close_orphans(self) -> None:
        """Cleans up runs that a dead driver left RUNNING: marks stages KILLED, to be reopened when needed, and deletes
        half-written trials and cells, to be written again."""
        for run in list(all_runs(self._client, self.experiment, "attributes.status = 'RUNNING'")):
            key, _ = key_and_scope(run)
            if "/" in key:
                self._client.delete_run(run.info.run_id)
                self._runs.pop(key, None)
            else:
                self._client.set_terminated(run.info.run_id, status="KILLED")

    def _log(self, key: str, metrics: dict[str, Any]) -> None:
        """Logs metrics, except those that the run already has from an interrupted call."""
        have = self._client.get_run(self._runs[key]).data.metrics
        self._batch(self._runs[key], metrics=[new for new in _metrics(metrics, 0) if have.get(new.key) != new.value])

    def _batch(self, run: str, metrics: list[Metric] | None = None, params: list[Param] | None = None) -> None:
        if not metrics and not params:
            return
        metrics = list({(metric.key, metric.step): metric for metric in metrics or []}.values())
        for start in range(0, max(len(metrics), 1), BATCH):
            self._client.log_batch(
                run, metrics=metrics[start : start + BATCH], params=(params or []) if start == 0 else [], tags=[]
            )


def all_runs(client: MlflowClient, experiment: str, condition: str = "") -> Iterator[Run]:
    """The runs of an experiment that meet a condition."""
    token = None
    while True:
        page = client.search_runs([experiment], condition, max_results=1000, page_token=token)
        yield from page
        if not (token := page.token):
            return


def key_and_scope(run: Run) -> tuple[str, str]:
    key, _, scope = run.data.tags.get(KEY_TAG, "").rpartition("#")
    return key, scope


def _is_transient(error: Exception) -> bool:
    """Whether the same call may succeed later, because the server was down or overloaded and did not reject it."""
    if isinstance(error, MlflowException):
        status = error.get_http_status_code()
        return status >= 500 or status in (408, 429)
    return isinstance(error, OSError | SQLAlchemyError)


def _metrics(values: dict[str, Any], step: int) -> list[Metric]:
    now = int(time.time() * 1000)
    return [
        Metric(key, float(value), now, int(step))
        for key, value in values.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and key != "step"
    ]


def _at(metric: Metric, step: int) -> Metric:
    return Metric(metric.key, metric.value, metric.timestamp, step)


def _params(values: dict[str, Any]) -> list[Param]:
    return [Param(key, str(value)[:PARAM_CHARACTERS]) for key, value in values.items() if value is not None]

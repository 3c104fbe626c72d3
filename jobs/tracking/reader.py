"""Reads a sweep's own run back from MLflow.

In: a store and an experiment, which has the sweep's name. Out: the figures, settings and identity of its last finished
run, files from the run's artifacts, and the page that compares several sweeps.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

from mlflow import MlflowClient

from jobs.errors import RequestError, public_line, without_secrets
from jobs.tracking.writer import all_runs, key_and_scope

SWEEP = "sweep"
"""The key of a sweep's own run."""


class TrackedSweep(NamedTuple):
    """A sweep's own run: `scope` is its start id, as in `start.json`; `settings` are the parameters of its stages,
    nested."""

    run: str
    scope: str
    metrics: dict[str, float]
    settings: dict[str, Any]


class Reader:
    """One MLflow store; every method raises RequestError if it does not answer."""

    def __init__(self, uri: str, key: str = "--tracking") -> None:
        self._shown = f"{key}: {without_secrets(uri)}"
        path = Path(urlsplit(uri).path[1:] if uri.startswith("sqlite:") else "")
        if uri.startswith("sqlite:") and not path.is_file():  # MLflow would create an empty store
            raise RequestError(f"{key}: there is no MLflow store at {path}")
        try:
            self._client = MlflowClient(tracking_uri=uri)
            self.sweeps = sorted(one.name for one in self._client.search_experiments() if one.name != "Default")
        except Exception as error:  # each kind of store has its own exceptions
            raise RequestError(f"{self._shown} does not answer ({public_line(error)})") from None

    def last_finished(self, name: str) -> TrackedSweep | None:
        """The sweep's newest successful run, or None. The experiment must exist."""
        try:
            experiment = self._client.get_experiment_by_name(name)
            assert experiment is not None
            runs = all_runs(self._client, experiment.experiment_id, "attributes.status = 'FINISHED'")
            own = [run for run in runs if key_and_scope(run)[0] == SWEEP]
            if not own:
                return None
            newest = max(own, key=lambda run: run.info.start_time)
            inside = f"tags.`mlflow.parentRunId` = '{newest.info.run_id}'"
            stages = list(all_runs(self._client, experiment.experiment_id, inside))
        except Exception as error:
            raise RequestError(f"{self._shown} does not answer ({public_line(error)})") from None
        settings: dict[str, Any] = {}
        for run in (newest, *stages):
            for key, text in run.data.params.items():
                _put(settings, key, _value(text))
        return TrackedSweep(newest.info.run_id, key_and_scope(newest)[1], dict(newest.data.metrics), settings)

    def fetch(self, run: str, names: Iterable[str], folder: Path) -> None:
        """Downloads the named artifacts into `folder`; skips those that the run lacks or that cannot be reached."""
        for name in names:
            with suppress(Exception):  # a bucket without credentials, a folder on another machine
                self._client.download_artifacts(run, name, str(folder))


def comparison(store: str) -> str | None:
    """The URL path of the MLflow page that compares every sweep's last finished run; None for fewer than two."""
    reader = Reader(store, "--root")
    experiments = {experiment.name: experiment.experiment_id for experiment in MlflowClient(store).search_experiments()}
    found = [(experiments[name], last.run) for name in reader.sweeps if (last := reader.last_finished(name))]
    if len(found) < 2:
        return None
    chosen, runs = (quote(json.dumps(column)) for column in zip(*found, strict=True))
    return f"/#/compare-runs?runs={runs}&experiments={chosen}"


def _put(settings: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        settings = settings.setdefault(part, {})
    settings[last] = value


def _value(text: str) -> Any:
    """Parses a parameter, which MLflow stores as text."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError):
        return text

"""What Tune may log: nothing that the search tells the user in a sentence of its own.

In: nothing. Out: loggers of Tune without tracebacks of workers that died and of disks that cannot be written.
"""

from __future__ import annotations

import logging

from ray.exceptions import RayActorError

from jobs.errors import no_storage

LOGGERS = [
    "ray.tune.execution.tune_controller",  # trials
    "ray.tune.execution.experiment_state",  # Tune's own state, written in the background and read by nobody
    "ray.train._internal.storage",  # Tune's folders
]


def quieten_tune() -> None:
    """May be called any number of times."""
    for name in LOGGERS:
        logging.getLogger(name).addFilter(is_news)
    logging.getLogger("ray.tune.tune").setLevel(logging.CRITICAL)  # it lists every failed attempt as a failed trial


def is_news(record: logging.LogRecord) -> bool:
    """False for the traceback of what the search reports in one line: a worker's death, or an error of the disk."""
    error = record.exc_info[1] if record.exc_info else None
    return error is None or not (isinstance(error, RayActorError) or no_storage(error) is not None)

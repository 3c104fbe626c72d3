"""Tune's loggers keep to themselves what the search says in a sentence."""

from __future__ import annotations

import importlib
import logging

import pytest
from ray.exceptions import RayActorError

from jobs.search.grouped import LOGGERS, quieten_tune

SAID = [
    RayActorError(),
    OSError(28, "No space left on device"),
    OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),  # from pyarrow
]


@pytest.mark.parametrize("name", LOGGERS)
def test_only_what_is_news_is_logged(name: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = importlib.import_module(name).logger
    assert logger is logging.getLogger(name)
    quieten_tune()
    for error in [*SAID, ValueError("something else")]:
        logger.error("failed with exception: ", exc_info=error)
    with caplog.at_level(logging.WARNING, name):
        logger.error("no exception")
    assert [record.exc_info and type(record.exc_info[1]) for record in caplog.records] == [ValueError, None]

"""A real Ray on this machine, shared by the tests in this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from jobs.cluster import environment

environment.prepare()

from jobs.cluster import connection as cluster  # noqa: E402
from search_spaces.schema import Compute  # noqa: E402


@pytest.fixture(scope="package")
def share() -> Iterator[cluster.Share]:
    cluster.connect(None)
    yield cluster.share_of(Compute(max_concurrent=2))
    cluster.disconnect()

"""Tracking a sweep that has nothing yet, such as one with a mistyped name."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.commands.track import track
from jobs.context.context import Context
from jobs.errors import RequestError
from search_spaces.load import load


def test_a_sweep_without_results_is_refused_and_leaves_no_trace(tmp_path: Path) -> None:
    context = Context(load("tiny", [f"storage.root={tmp_path}", "name=tinny"]))
    with pytest.raises(RequestError, match="has no finished stage; run `deltascope sweep` first"):
        track(context)
    assert list(tmp_path.rglob("*")) == []

"""What is found out before the first stage works."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.cluster.connection import Share
from jobs.errors import RequestError
from jobs.study.context import Context
from jobs.study.stage_list import NAMES
from jobs.study.sweep import check_workers
from search_spaces.load import load

SETTINGS = ["lora.workers_per_trial", "transcoders.workers_per_layer", "deltas.workers_per_trial"]


@pytest.mark.parametrize("setting", SETTINGS)
def test_workers_that_do_not_fit_are_refused_before_any_stage(tmp_path: Path, setting: str) -> None:
    context = Context(load("tiny", [f"storage.root={tmp_path}", f"{setting}=3"]))
    vars(context)["share"] = Share(1, 0.0, at_once=2)
    with pytest.raises(RequestError, match=f"{setting}: got 3, .* room for 2 at once"):
        check_workers(context, NAMES)
    check_workers(context, [name for name in NAMES if name != setting.partition(".")[0]])  # it is done already

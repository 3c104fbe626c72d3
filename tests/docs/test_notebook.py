"""examples/knob.ipynb, run cell by cell as it stands, on a finished sweep of the tiny model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from sites import sites_label
from tests.end_to_end.conftest import REPOSITORY

NOTEBOOK = REPOSITORY / "examples" / "knob.ipynb"
SETTINGS = 'CONFIG, OVERRIDES = "quickstart", ["storage.root=../mlruns"]'


@pytest.fixture(scope="module")
def names(finished) -> dict[str, Any]:
    """What the notebook defines, on another sweep than the quickstart."""
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    source = "\n\n".join("".join(cell["source"]) for cell in cells)
    assert SETTINGS in source
    source = source.replace(SETTINGS, f'CONFIG, OVERRIDES = "tiny", ["storage.root={finished[0]}"]')
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plt, "show", lambda: plt.close("all"))
        exec(compile(source, str(NOTEBOOK), "exec"), found)
    return found


def test_its_knob_is_that_of_the_tables(names: dict[str, Any]) -> None:
    """At full strength, on all sites."""
    context, rows = names["context"], names["rows"]
    table = pd.read_csv(Path(context.space.report) / "recovered.csv", dtype={"layer": str})
    table = table[(table["target"] == "change") & (table["metric"] == "mean_ce") & (table["condition"] == "full")]
    every = sites_label(context.sites_of("change"))
    for subset in context.subsets:
        here = [row for row in rows if row.label == subset]
        said = table[(table["layer"] == every) & (table["subset"] == subset)]["value"].item()
        assert names["cross_entropy"](here, 1.0) == pytest.approx(said, abs=1e-4)
    assert list(names["knob"].index) == names["alphas"]
    assert set(names["knob"].columns) == set(context.subsets)


def test_it_answers_at_every_strength(names: dict[str, Any]) -> None:
    answers = {alpha: names["answer"](names["row"], alpha) for alpha in (0.0, 1.0)}
    assert all(isinstance(text, str) for text in answers.values())
    assert len(names["only"]) == 3

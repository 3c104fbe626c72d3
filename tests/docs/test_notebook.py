"""examples/knob.ipynb, run cell by cell as it stands, on a finished sweep of the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import pytest

from data.rows import slug
from jobs.context.context import Context
from jobs.evaluation.work import place_of
from sites import KINDS, sites_label
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


def generations(context: Context, name: Callable[[str], str]) -> dict[tuple[str, str], str]:
    """Texts that the sweep generated, by subset and input; `name` gives the file of a subset."""
    files = [context.space.generations / f"{name(slug(subset))}.jsonl" for subset in context.subsets]
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return {(line["subset"], line["input"]): line["generation"] for line in lines}


def test_its_ends_answer_as_the_sweep_did(names: dict[str, Any]) -> None:
    """At alpha 0 as the un-finetuned model, at alpha 1 as with all deltas."""
    context, rows = names["context"], names["rows"]
    place = place_of(context.sites_of("change"), *names["chosen"])
    kept = {
        0.0: generations(context, lambda subset: f"base_model_raw_{subset}"),
        1.0: generations(context, lambda subset: f"{place}_{subset}_full"),
    }
    assert kept[0.0] != kept[1.0], "else the test would not see alpha"
    for alpha, texts in kept.items():
        assert {(row.label, row.input): names["answer"](row, alpha) for row in rows} == texts


def test_it_measures_each_kind_of_site_alone(names: dict[str, Any]) -> None:
    kinds = names["only"].items()
    assert {words: {patch.site.kind.words for patch in patches} for words, patches in kinds} == {
        kind.words: {kind.words} for kind in KINDS.values()
    }
    assert sum(len(patches) for _, patches in kinds) == len(names["patches"])

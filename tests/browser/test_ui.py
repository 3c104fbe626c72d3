"""The web pages on a finished tiny sweep in a real browser, as a user opens them: what they show, and pictures of it.

In: the finished sweep, and a browser. Out: `test-output/*.png`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from optuna.storages.journal import JournalFileBackend
from playwright.sync_api import Locator, Page, expect

from evaluators.tables.pooling import means_of
from tests.browser.conftest import PICTURES
from tests.end_to_end.conftest import read, served

pytestmark = pytest.mark.xdist_group("pages of servers")  # one server for all of them

STAGES = ("data", "lora", "transcoders", "deltas", "evaluate", "report")


@pytest.fixture(scope="module")
def mlflow(finished: tuple[Path, object]) -> Iterator[str]:
    """The address that `python -m jobs ui` prints for the sweep."""
    with served(finished[0]) as (_, process):
        assert process.stdout is not None
        yield next(line.split()[1] for line in process.stdout if line.strip().startswith("tiny: "))


def row(page: Page, name: str) -> Locator:
    return page.locator(".ag-row", has=page.get_by_role("link", name=name, exact=True))


def open_row(page: Page, name: str) -> None:
    row(page, name).get_by_role("button").first.click()


def test_the_run_tree(page: Page, mlflow: str, finished: tuple[Path, object]) -> None:
    page.goto(mlflow)
    expect(row(page, "tiny")).to_be_visible()
    expect(row(page, "lora")).to_have_count(0)
    open_row(page, "tiny")
    for stage in STAGES[:4]:
        expect(row(page, stage)).to_be_visible()
    open_row(page, "lora")
    losses = [read(path)["figures"]["val_loss"] for path in sorted(finished[0].glob("sweeps/tiny/lora/*/result.json"))]
    assert len(losses) == 4
    for number, loss in enumerate(losses):
        expect(row(page, f"trial_{number:04d}")).to_be_visible()
        expect(page.get_by_role("gridcell", name=str(loss)[:8])).not_to_have_count(0)
    page.screenshot(path=PICTURES / "mlflow_run_tree.png")


def test_the_compare_page_of_two_cells(page: Page, mlflow: str, finished: tuple[Path, object]) -> None:
    cells = finished[0] / "sweeps" / "tiny" / "cells"
    names = sorted(
        path.stem for path in cells.glob("layer_01+01.o+01.qkv_change_*_tool_*.json") if "_s1_" not in path.name
    )
    names = [name for name in names if name.endswith(("_tool_full", "_tool_no_delta"))]
    assert len(names) == 2
    page.goto(mlflow)
    expect(page).to_have_url(re.compile("orderByAsc"))  # the shared view has been read; until then it empties the box
    expect(row(page, "tiny")).to_be_visible()
    start = names[0].removesuffix("full")
    page.get_by_test_id("search-box").fill(f"params.subset = 'tool' AND attributes.run_name LIKE '{start}%'")
    page.get_by_test_id("search-box").press("Enter")
    expect(page).to_have_url(re.compile("searchFilter=params"))
    open_row(page, "evaluate")
    for name in names:
        row(page, name).get_by_role("checkbox").check()
    page.get_by_role("button", name="Compare").click()
    expect(page.get_by_role("heading", name=re.compile("Comparing 2 Runs"))).to_be_visible()
    for name in names:
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    metric = page.get_by_role("link", name="mean_ce", exact=True)
    expect(metric).to_be_visible()
    values = [f"{means_of(read(cells / f'{name}.json'))['mean_ce']:.4g}" for name in names]
    assert values[0] != values[1]
    for value in values:
        expect(page.get_by_text(value, exact=True).first).to_be_visible()
    page.screenshot(path=PICTURES / "mlflow_compare.png")
    metric.scroll_into_view_if_needed()
    page.screenshot(path=PICTURES / "mlflow_compare_metrics.png")


def test_the_dashboard_lists_the_studies(page: Page, finished: tuple[Path, object]) -> None:
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(finished[0] / "optuna" / "journal.log")))
    names = optuna.get_all_study_names(storage)
    with served(finished[0], "--studies") as (address, _):
        page.goto(address)
        for name in names:
            expect(page.get_by_text(name).first).to_be_visible()
        page.screenshot(path=PICTURES / "optuna_studies.png", full_page=True)
        lora = next(name for name in names if name.startswith("tiny/lora@"))
        page.get_by_text(lora).first.click()
        expect(page.get_by_role("heading", name="History")).to_be_visible()
        page.screenshot(path=PICTURES / "optuna_study.png")


def test_two_sweeps_side_by_side(page: Page, seeds) -> None:
    """The link is the one that `ui` prints. The axes that MLflow chooses are the settings that differ and the first
    figure."""
    with served(seeds.root) as (_, process):
        assert process.stdout is not None
        link = next(line.split()[-1] for line in process.stdout if "side by side" in line)
        page.goto(link)
        expect(page.get_by_role("heading", name=re.compile("Comparing 2 Runs"))).to_be_visible()
        for name in ("tiny-s0", "tiny-s1"):
            expect(page.get_by_text(name, exact=True).first).to_be_visible()
        for axis in ("seed", "recovered_ce_tool"):
            expect(page.get_by_text(axis, exact=True).first).to_be_visible()
        page.screenshot(path=PICTURES / "mlflow_compare_sweeps.png", full_page=True)

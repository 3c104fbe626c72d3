"""The report and its features page in a real browser, opened from disk as a user does: what they do, and pictures.

In: the finished sweep's pages, and a made-up sweep of 100 layers. Out: `test-output/*.png`, light and dark, on a wide
screen and on a phone.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from playwright.sync_api import Locator, expect

from evaluators.report.comparison_page import page as comparison_page
from evaluators.report.feature_page import feature_page
from evaluators.tables.feature_tables import features_table, ranking_table
from tests.browser.conftest import PICTURES, SCREENS, Opened
from tests.evaluators.compared import sweep

LAYERS, WIDTH, CARDS = 100, 128, 100


@pytest.fixture(scope="module")
def report(finished: tuple[Path, object]) -> Path:
    return finished[0] / "sweeps" / "tiny" / "report"


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features page of a sweep with very many features."""
    draw = random.Random(0)
    subsets = ("tool", "copy", "tool_ood")
    names = [(layer, feature) for layer in range(LAYERS) for feature in range(WIDTH)]
    draw.shuffle(names)
    ranked = [
        {"layer": layer, "feature": feature, "effect": 1 / place}
        | {"firing_rate": {one: draw.random() for one in subsets}}
        for place, (layer, feature) in enumerate(names, start=1)
    ]

    def entries(shift: float) -> list[dict]:
        return [
            {"subset": one, "nll": 10 + shift * draw.random(), "nll_whole": 10.0, "n_tokens": 10}
            | {"behaviours": {"calls": number > 3}, "behaviours_whole": {"calls": True}}
            for one in subsets
            for number in range(8)
        ]

    context = {"subset": "tool", "tokens": [" token"] * 33, "acts": [draw.random() for _ in range(33)], "peak": 3}
    cards = [
        {"layer": layer, "feature": feature, "at_bos": False, "contexts": [context] * 10}
        | {"histogram": {"top": 1.0, "counts": [draw.randrange(50) for _ in range(24)]}}
        | {"promoted": [" a"] * 8, "suppressed": [" b"] * 8, "ablated": entries(3), "alone": entries(-3)}
        for layer, feature in names[:CARDS]
    ]
    common = {"target": "change", "percentile": None, "d_new": WIDTH}
    cells = [{"kind": "ranking", **common, "features": ranked}, {"kind": "cards", **common, "cards": cards}]
    path = tmp_path_factory.mktemp("large") / "features.html"
    path.write_text(feature_page(cells, features_table(cells), ranking_table(cells), "A made-up pair."))
    return path


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The comparison of three made-up sweeps, two of which differ in the seed alone."""
    wider = {"deltas": {"d_new": [64]}}
    sweeps = [sweep("one", 0), sweep("two", 1, recovered=0.8, gap=1.7), sweep("wide", 0, wider, recovered=0.97)]
    path = tmp_path_factory.mktemp("compared") / "comparison.html"
    path.write_text(comparison_page(sweeps))
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_pictures(opened: Opened, report: Path, compared: Path, screen: str, scheme: str) -> None:
    end = f"{screen}_{scheme}.png"
    page = opened(report / "report.html", screen, color_scheme=scheme)
    page.screenshot(path=PICTURES / f"report_{end}", full_page=True)
    look = opened(report / "look.html", screen, color_scheme=scheme)
    look.screenshot(path=PICTURES / f"look_{end}", full_page=True)
    page = opened(report / "features.html", screen, color_scheme=scheme)
    page.locator(".card").first.screenshot(path=PICTURES / f"card_{end}")
    page.locator("#view").scroll_into_view_if_needed()
    page.screenshot(path=PICTURES / f"list_{end}")
    together = opened(compared, screen, color_scheme=scheme)
    together.screenshot(path=PICTURES / f"comparison_{end}", full_page=True)
    for one in (page, together, look, opened(report / "report.html", screen, color_scheme=scheme)):
        assert one.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"


def test_from_the_report_to_the_first_look(opened: Opened, report: Path) -> None:
    page = opened(report / "report.html")
    page.locator("nav a[href='look.html']").click()
    shaded = page.locator("span[title]")
    assert "finetuned" in (shaded.first.get_attribute("title") or "")
    colours = {one.evaluate("one => getComputedStyle(one).backgroundColor") for one in shaded.all()[:60]}
    assert len(colours) > 1, "shades follow the divergence"
    expect(page.get_by_role("heading", name="What the mean change reads")).to_be_visible()


def test_from_the_report_to_a_card(opened: Opened, report: Path) -> None:
    page = opened(report / "report.html")
    link = page.locator("a[href^='features.html#']").first
    address = (link.get_attribute("href") or "").partition("#")[2]
    link.click()
    expect(page.locator(f"#{address}")).to_be_in_viewport()


def layer_of(card: Locator) -> int:
    """By a card's address: `L3F001` of an MLP, `L3-qkvF001` of attention."""
    return int((card.get_attribute("id") or "").partition("F")[0].removeprefix("L").partition("-")[0])


def test_sorting_and_filtering(opened: Opened, report: Path) -> None:
    page = opened(report / "features.html")
    cards = page.locator(".card")
    every = cards.count()
    page.locator("#sort").select_option("layer")
    layers = [layer_of(one) for one in page.locator(".card").all()]
    assert layers == sorted(layers)
    assert len(set(layers)) > 1
    layer = layer_of(page.locator(".card:visible").first)
    page.locator("#layer").fill(str(layer))
    shown = [one.get_attribute("id") for one in page.locator(".card:visible").all()]
    assert shown
    assert all(one.startswith((f"L{layer}F", f"L{layer}-")) for one in shown)
    assert all(one.partition(".")[0] == str(layer) for one in page.locator(".row > :nth-child(2)").all_inner_texts())
    page.locator("#least").fill("1000")
    expect(page.locator(".card:visible")).to_have_count(0)
    expect(page.get_by_text(f"0 of {every} cards")).to_be_visible()
    page.goto(page.url.partition("#")[0] + f"#{shown[0]}")
    expect(page.locator(f"#{shown[0]}")).to_be_in_viewport()


def test_cards_stand_in_order_without_scripts(opened: Opened, report: Path) -> None:
    page = opened(report / "features.html", java_script_enabled=False)
    assert "estimated effect" in page.locator(".card").first.inner_text()
    expect(page.get_by_text("feature_ranking.csv")).to_be_visible()
    expect(page.locator("#layer")).to_be_hidden()


def test_a_hundred_layers_weigh_little_and_scroll(opened: Opened, large: Path) -> None:
    assert large.stat().st_size < 30e6
    page = opened(large, address="#all")
    rows = page.locator(".row")
    assert rows.count() < 100
    expect(page.locator(".row > :nth-child(4)").first).to_have_text("1")
    expect(page.locator("#view")).to_be_in_viewport()
    page.locator("#view").evaluate("view => view.scrollTop = view.scrollHeight")
    page.locator("#view").evaluate("view => view.scrollIntoView({block: 'end'})")
    last = page.locator(".row > :nth-child(4)", has_text=str(LAYERS * WIDTH))
    expect(last).to_be_in_viewport()
    assert rows.count() < 100
    page.locator("#view").screenshot(path=PICTURES / "list_of_100_layers.png")
    page.get_by_role("button", name="fires, copy").click()
    firing = [float(one.rstrip("%")) for one in page.locator(".row > :nth-child(7)").all_inner_texts()]
    assert firing == sorted(firing, reverse=True)
    assert firing[0] > 99

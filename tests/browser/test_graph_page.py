"""The page of an attribution graph in a real browser: what a reader does there, and pictures.

In: made-up graphs, one of them with 200 tokens, 500 nodes and 5,000 edges. Out: `test-output/graph_*.png`, light and
dark, on a wide screen and on a phone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Locator, Page, expect

from evaluators.report.graph_page import graph_page
from tests.browser.conftest import PICTURES, SCREENS, Opened
from tests.evaluators.graphs import graph

LEAST_TARGET = 40
"""Pixels of what can be tapped on a phone."""
Shown = Callable[..., Page]


@pytest.fixture
def shown(opened: Opened, tmp_path: Path) -> Shown:
    """Opens the page of a graph."""

    def show(made: dict[str, Any] | None = None, screen: str = "wide", **options: Any) -> Page:
        path = tmp_path / "graph.html"
        path.write_text(graph_page(made or graph()), encoding="utf-8")
        return opened(path, screen, **options)

    return show


def node(page: Page, number: int | str) -> Locator:
    return page.locator(f".node[data-id=n{number}]")


def focused(page: Page) -> str:
    return str(page.evaluate("document.activeElement.dataset.id"))


def faded(page: Page) -> set[str]:
    """The nodes that are neither selected nor on a path to or from it."""
    return set(page.locator(".picked .node:not(.path)").evaluate_all("all => all.map((one) => one.dataset.id)"))


def reached(edges: list[list[Any]], start: int) -> set[int]:
    """A node with all that leads to it and all that it leads to."""
    found = {start}
    for source, target in ((0, 1), (1, 0)):
        side, added = {start}, True
        while added:
            new = {edge[target] for edge in edges if edge[source] in side} - side
            added = bool(new)
            side |= new
        found |= side
    return found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("screen", SCREENS)
def test_pictures(shown: Shown, screen: str, scheme: str) -> None:
    end = f"{screen}_{scheme}.png"
    page = shown(graph(noise=(0.45, 0.1)), screen, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"
    page.screenshot(path=PICTURES / f"graph_{end}", full_page=True)
    page.screenshot(path=PICTURES / f"graph_top_{end}")
    page.locator(".node.o").nth(6).click()
    page.locator(".explorer").evaluate("one => one.scrollIntoView()")
    page.screenshot(path=PICTURES / f"graph_node_{end}")
    page.locator("#grouping").check()
    page.locator(".node.group").first.click()
    page.locator(".explorer").evaluate("one => one.scrollIntoView()")
    page.screenshot(path=PICTURES / f"graph_group_{end}")
    page.locator("#checks").evaluate("one => one.scrollIntoView()")
    page.screenshot(path=PICTURES / f"graph_checks_{end}")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "it scrolls sideways"


def test_a_click_selects_and_the_rest_fades(shown: Shown) -> None:
    made = graph()
    page = shown(made)
    expect(page.locator("#panel h3")).to_have_text("Select a node")
    number = next(
        place for place, one in enumerate(made["nodes"]) if one["promoted"] and one["card"] and one["layer"] > 20
    )
    one = made["nodes"][number]
    node(page, number).click()
    panel = page.locator("#panel")
    expect(panel.locator("h3")).to_contain_text(f"of layer {one['layer']}")
    expect(panel).to_contain_text(f"feature {one['feature']}")
    expect(panel).to_contain_text(f"position {one['position']}")
    expect(panel.get_by_role("link")).to_have_attribute("href", one["card"])
    assert faded(page) == {f"n{other}" for other in range(len(made["nodes"]))} - {
        f"n{other}" for other in reached(made["edges"], number)
    }
    assert faded(page)
    expect(node(page, number)).to_have_attribute("aria-pressed", "true")
    page.keyboard.press("Escape")
    assert not faded(page)
    expect(panel.locator("h3")).to_have_text("Select a node")


def test_edges_in_the_panel_lead_on(shown: Shown) -> None:
    made = graph()
    page = shown(made)
    output = len(made["nodes"]) - 1
    node(page, output).click()
    panel = page.locator("#panel")
    expect(panel.locator("h3")).to_have_text("Output")
    into = sorted((edge for edge in made["edges"] if edge[1] == output), key=lambda edge: -abs(edge[2]))
    expect(panel.locator("li")).to_have_count(min(12, len(into)))
    panel.locator("li button").first.click()
    expect(node(page, into[0][0])).to_have_attribute("aria-pressed", "true")
    expect(node(page, into[0][0])).to_be_in_viewport()
    expect(panel.locator("h3")).to_be_focused()
    panel.get_by_role("button", name=re.compile("^To Output")).click()
    expect(panel.locator("h3")).to_have_text("Output")
    panel.get_by_role("button", name="Clear").click()
    expect(panel.locator("h3")).to_have_text("Select a node")
    assert focused(page) == f"n{output}"


def test_the_keyboard_goes_everywhere(shown: Shown) -> None:
    made = graph()
    page = shown(made)
    nodes, output = made["nodes"], len(made["nodes"]) - 1
    expect(page.locator(".node[tabindex='0']")).to_have_count(1)
    page.locator(".node[tabindex='0']").focus()
    assert focused(page) == f"n{output}"
    seen = []
    for key in ("ArrowDown", "ArrowDown", "ArrowLeft", "ArrowRight", "ArrowUp", "Home", "ArrowUp", "ArrowRight", "End"):
        page.keyboard.press(key)
        expect(page.locator(":focus")).to_be_in_viewport()
        box, place = (page.locator(one).bounding_box() or {} for one in ("#box", ":focus"))
        assert box["x"] <= place["x"] <= box["x"] + box["width"], key
        assert box["y"] <= place["y"] <= box["y"] + box["height"], key
        seen.append((key, nodes[int(focused(page)[1:])], place))
    assert seen[0][1]["layer"] < nodes[output]["layer"]
    assert seen[1][1]["layer"] <= seen[0][1]["layer"]
    assert seen[0][1]["position"] == seen[1][1]["position"] == nodes[output]["position"], "down in one column"
    assert seen[2][1]["position"] <= seen[1][1]["position"]
    assert seen[5][1]["position"] == 0
    assert seen[7][1]["position"] >= seen[6][1]["position"]
    assert focused(page) == f"n{output}"
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Enter")
    expect(page.locator(":focus")).to_have_attribute("aria-pressed", "true")
    assert page.locator(".picked").count() == 1
    ring = page.locator(":focus .ring").evaluate("one => getComputedStyle(one).stroke")
    assert ring != "none"
    page.keyboard.press("Escape")
    assert page.locator(".picked").count() == 0
    expect(page.locator(".node[tabindex='0']")).to_have_count(1)


def test_every_node_says_what_it_is(shown: Shown) -> None:
    page = shown()
    said = page.locator(".node").evaluate_all("all => all.map((one) => one.getAttribute('aria-label'))")
    assert len(said) == len(graph()["nodes"])
    assert sum(one.startswith("Output: logit of '<'") for one in said) == 1
    others = [one for one in said if not one.startswith(("Output", "Un-finetuned rest"))]
    assert all(re.match(r"(MLP|Attention's output|Queries, keys and values) of layer \d+", one) for one in others)
    assert all("at position" in one and "influence" in one for one in others)


def test_nodes_do_not_overlap(shown: Shown) -> None:
    page = shown(graph(features=200, edges=400, groups=0))
    page.locator("#share").fill("100")
    expect(page.locator(".node")).to_have_count(208)
    places = page.locator(".node .hit").evaluate_all(
        "all => all.map((one) => { const {x, y, width} = one.getBoundingClientRect(); return [x, y, width]; })"
    )
    ordered = sorted(places)
    for place, (x, y, width) in enumerate(ordered):
        for other_x, other_y, _ in ordered[place + 1 :]:
            assert other_x - x >= width - 1 or abs(other_y - y) >= width - 1


def test_a_large_graph_with_groups_begins_with_them_and_without_the_rests_lines(shown: Shown) -> None:
    page = shown(graph(features=200, edges=400))
    expect(page.locator("#grouping")).to_be_checked()
    assert 1 < page.locator(".node.group").count() <= page.locator(".node").count() <= 122
    base = page.locator("#drawing .edge.base")
    for place in range(base.count()):
        expect(base.nth(place)).to_be_hidden()
    page.locator("#grouping").uncheck()
    expect(page.locator(".node.group")).to_have_count(0)


def test_the_slider_prunes_by_influence(shown: Shown) -> None:
    made = graph()
    page = shown(made)
    expect(page.locator("#drawn")).to_have_text("Drawn: 60 of 60 nodes besides the output, and 265 of 265 edges.")
    page.locator("#share").fill("50")
    ranked = sorted(enumerate(made["nodes"][:-1]), key=lambda one: -one[1]["influence"])
    whole, kept, total = sum(one["influence"] for one in made["nodes"][:-1]), [], 0.0
    for number, one in ranked:
        kept.append(number)
        total += one["influence"]
        if total >= whole / 2:
            break
    expect(page.locator(".node")).to_have_count(len(kept) + 1)
    drawn = page.locator(".node").evaluate_all("all => all.map((one) => one.dataset.id)")
    assert set(drawn) == {f"n{number}" for number in [*kept, len(made["nodes"]) - 1]}
    left = [edge for edge in made["edges"] if {edge[0], edge[1]} <= {*kept, len(made["nodes"]) - 1}]
    expect(page.locator("#drawing .edge")).to_have_count(len(left))
    expect(page.locator("#drawn")).to_contain_text(
        f"{len(kept)} of 60 nodes besides the output, and {len(left)} of 265"
    )
    expect(page.locator("#percent")).to_have_text("50%")


def test_groups_open_and_close(shown: Shown) -> None:
    made = graph()
    page = shown(made)
    page.locator("#grouping").check()
    places = {(one["group"], one["position"]) for one in made["nodes"] if one["group"] is not None}
    expect(page.locator(".node.group")).to_have_count(len(places))
    alone = sum(one["group"] is None for one in made["nodes"])
    expect(page.locator(".node")).to_have_count(len(places) + alone)
    group, position = max(
        places, key=lambda place: sum((one["group"], one["position"]) == place for one in made["nodes"])
    )
    members = [
        number for number, one in enumerate(made["nodes"]) if (one["group"], one["position"]) == (group, position)
    ]
    assert len(members) > 1
    page.locator(f".node[data-id='g{group}@{position}']").click()
    panel = page.locator("#panel")
    expect(panel.locator("h3")).to_have_text(f"Group {group}")
    expect(panel).to_contain_text(f"{len(members)} here, {7 + 3 * group} in the group")
    for number in members:
        expect(node(page, number)).to_have_attribute("aria-pressed", "true")
    panel.get_by_role("button", name=re.compile("^Select ")).first.click()
    expect(panel).to_contain_text("Close its group")
    panel.get_by_role("button", name="Close its group").click()
    expect(page.locator(".node.group")).to_have_count(len(places))
    assert focused(page) == f"g{group}@{position}"
    page.keyboard.press("Enter")
    expect(node(page, members[0])).to_be_visible()
    page.locator("#grouping").uncheck()
    expect(page.locator(".node.group")).to_have_count(0)


def test_a_phone_shows_the_panel_below_and_can_be_tapped(shown: Shown) -> None:
    page = shown(screen="phone", has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth <= 390")
    box, panel = (page.locator(one).bounding_box() or {} for one in ("#box", "#panel"))
    assert panel["y"] >= box["y"] + box["height"]
    assert page.locator("#box").evaluate("one => one.scrollWidth > one.clientWidth"), "the graph scrolls by itself"
    for target in (".node .hit", "#panel button", ".tools button", ".tools label"):
        sizes = page.locator(target).evaluate_all("all => all.map((one) => one.getBoundingClientRect().height)")
        assert min(sizes) >= LEAST_TARGET, target
    page.locator("#first").tap()
    assert page.locator("#box").evaluate("one => one.scrollLeft") == 0
    page.locator("#last").tap()
    expect(page.locator(".node.output")).to_be_in_viewport()
    page.locator(".node.output").tap()
    expect(page.locator("#panel h3")).to_have_text("Output")
    page.locator("#panel li button").first.tap()
    expect(page.locator("#panel h3")).not_to_have_text("Output")


def test_without_scripts_the_strongest_edges_can_be_read(shown: Shown) -> None:
    page = shown(java_script_enabled=False)
    expect(page.get_by_text("The drawing needs scripts")).to_be_visible()
    expect(page.locator("#share")).to_be_hidden()
    expect(page.locator("#edges table").first).to_be_visible()
    assert "Output" in page.locator("#edges tbody tr").first.inner_text()


def test_odd_tokens_and_small_graphs(shown: Shown) -> None:
    odd = ["<bos>", "<script>document.title='bad'</script>", "\u202eright", "", "\ud800", "שלום", "👩‍💻", "\n" * 3]
    page = shown(graph(odd, groups=0))
    for one in page.locator(".node").all()[:12]:
        one.dispatch_event("click")
    assert page.title() == "Attribution graph"
    page.locator("#every").check()
    expect(page.locator("#heads > div")).to_have_count(len(odd))
    expect(page.locator("#heads > div").nth(1)).to_contain_text("<script>")
    page = shown(graph(["<bos>"], features=0, edges=0, groups=0, checked=0))
    expect(page.locator(".node")).to_have_count(1)
    page.locator(".node").click()
    expect(page.locator("#panel h3")).to_have_text("Output")
    for key in ("ArrowUp", "ArrowLeft", "Home", "End", "Enter", "Escape"):
        page.keyboard.press(key)


def test_a_large_graph_stays_usable(shown: Shown) -> None:
    page = shown(graph(["<bos>", *(f" word{place}" for place in range(199))], features=493, edges=5000, groups=0))
    assert 100 <= page.locator(".node").count() <= 121, "a part is drawn to begin with"
    page.locator("#share").fill("100")
    expect(page.locator("#drawing .edge")).to_have_count(5048)
    page.locator("#first").click()
    assert page.locator("#box").evaluate("one => one.scrollLeft") == 0
    expect(page.locator("#heads > div").first).to_contain_text("<bos>")
    page.locator("#last").click()
    expect(page.locator(".node.output")).to_be_in_viewport()
    page.locator("#panel li button").first.click()
    expect(page.locator("#drawing .edge.direct").first).to_have_css("visibility", "visible")
    off = page.locator("#drawing .edge:not(.path)").first
    expect(off).to_have_css("visibility", "hidden")
    page.keyboard.press("Escape")
    expect(off).to_have_css("visibility", "visible")
    page.locator("#labels").check()
    page.locator("#every").check()
    expect(page.locator("#heads > div")).to_have_count(200)
    page.locator("#box").screenshot(path=PICTURES / "graph_of_500_nodes.png")

"""Graphs in a report: a line and a page for each, with links to the cards that exist."""

import pandas as pd

from evaluators.measures.graph_formats import with_groups
from evaluators.report.graphs_section import graphs_pages, graphs_section, graphs_table
from evaluators.report.page import Link
from tests.evaluators.graphs import graph as drawn

SAME = {"prompt": "Hello."}


def cells() -> list[dict]:
    graph = {"prompt": "Compute 243 / 694.", **drawn()}
    return [
        {"kind": "graph", "target": "change", "subset": "tool", "graphs": [SAME, graph]},
        {"kind": "graph", "target": "change", "subset": "the <copy>", "graphs": [graph]},
    ]


def test_a_graph_is_a_row_and_so_is_a_prompt_without_a_difference() -> None:
    table = graphs_table(cells())
    assert table["subset"].tolist() == ["tool", "tool", "the <copy>"]
    assert table["nodes"].isna().tolist() == [True, False, False]
    found = drawn()
    assert table["random_r"].iloc[1] == found["checks"]["correlation"]["random"][0]
    assert table["nodes"].iloc[1] == found["counts"]["nodes"]


def test_each_graph_has_a_page_with_links_to_the_cards_there_are() -> None:
    node = next(node for node in drawn()["nodes"] if node["kind"] == "feature")
    features = pd.DataFrame([{"target": "change", "layer": node["site"], "feature": node["feature"]}])
    pages = graphs_pages(cells(), features, "a pair")
    first, second = pages
    assert first == "graph_tool_2.html"
    assert second.startswith("graph_the-copy")
    assert pages[first].count("features.html#") >= 1
    assert "<copy>" not in pages[second]
    section = graphs_section(cells())
    links = [cell for row in section.blocks[0].rows for cell in row if isinstance(cell, Link)]
    assert [link.href for link in links] == list(pages)
    assert "both models say the same" in section.blocks[0].rows[0]
    assert graphs_section([]) is None


def test_nodes_know_their_groups_and_only_those_shown_are_listed() -> None:
    found = drawn()
    nodes = [node for node in found["nodes"] if node["kind"] == "feature"]
    groups = [
        {"number": 1, "features": [["29", 100_000]], "fires_on": [["x", 0.5]]},
        {"number": 2, "features": [[nodes[0]["site"], nodes[0]["feature"]]], "fires_on": [["<", 0.5], ["(", 0.1]]},
    ]
    grouped = with_groups(found, {"groups": groups})
    assert grouped["groups"] == [{"number": 2, "fires_on": ["<", "("], "size": 1}]
    numbers = {(node["site"], node["feature"]): node["group"] for node in grouped["nodes"]}
    assert numbers.pop((nodes[0]["site"], nodes[0]["feature"])) == 2
    assert set(numbers.values()) == {None}
    assert with_groups(found, None)["groups"] == []

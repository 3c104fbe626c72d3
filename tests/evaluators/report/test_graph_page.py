"""The page of an attribution graph: what it says, its warning, its tables, and that no token can add markup."""

import base64
import hashlib
import json
import re

import pytest

from evaluators.report.graph_page import LISTED, graph_page, name
from evaluators.report.scripted import visible
from tests.evaluators.graphs import graph

ODD = [
    "<script>alert(1)</script>",
    "</script>",
    "\u202ereversed",
    "\x00",
    "\ud800",
    "",
    "é",
    "👩‍💻",
    "' \" & $x$ _y",
    "\t\n",
]


@pytest.fixture(scope="module")
def page():
    return graph_page(graph())


def words(page):
    """The page's text as a reader sees it: without markup, styles and data."""
    body = re.sub(r"<(script|style)\b.*?</\1>", "", page, flags=re.DOTALL)
    return " ".join(re.sub(r"<[^>]+>", " ", body).split())


def data(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def test_it_says_what_is_explained(page):
    said = words(page)
    assert "The finetuned model says &lt; The un-finetuned model says The" in said
    assert "logit of &#39;&lt;&#39; minus logit of &#39;The&#39; +6.412 in the spliced model; -2.183" in said
    assert "What the deltas bring +8.595" in said
    assert "53 of 623 active features are in the graph, besides 6 at BOS" in said
    assert "Attention patterns and the scales of norms are held at their values in this run." in said
    assert "It does not claim that the finetuned model itself takes these paths" in said
    assert "The output is" not in said
    assert "30 layers, qkv, o and mlp, 128 features each" in said


def test_the_output_is_the_sum_of_the_groups_effects_on_it():
    made = graph()
    end = next(number for number, node in enumerate(made["nodes"]) if node["kind"] == "output")
    group = next(node["group"] for node in made["nodes"] if node["group"] is not None)
    into = [edge for edge in made["edges"] if edge[1] == end]
    of_group = [weight for source, _, weight in into if made["nodes"][source]["group"] == group]
    page = words(graph_page(made))
    left_out = made["output"]["value"] - sum(weight for *_, weight in into)
    assert f"edges that are not in the graph {left_out:+.3f}" in page
    if of_group:
        assert f"group {group}" in page
    assert "is the sum of direct effects" in page
    made["edges"] = []
    assert "is the sum of direct effects" not in words(graph_page(made))


def test_what_is_not_frozen_is_said():
    made = graph()
    made["frozen"] = {"patterns": True, "norms": False}
    said = words(graph_page(made))
    assert (
        "Attention patterns are held at their values in this run; the scales of norms may change with a feature" in said
    )


@pytest.mark.parametrize(
    ("noise", "warned"), [((0.5, 0.1), True), ((0.1, 0.5), True), ((0.21, 0.1), True), ((0.2, 0.2), False)]
)
def test_a_warning_comes_first_where_a_correlation_is_below_the_limit(noise, warned):
    page = graph_page(graph(noise=noise))
    assert ('class="warning"' in page) == warned
    if warned:
        first = words(page).partition("Attribution graph of one prompt")[2].strip()
        assert first.startswith("Read single edges with caution")
        assert f"{1 - noise[0]:.3f} [" in first.partition("Below 0.8")[0]


@pytest.mark.parametrize("unknown", [None, [float("nan")] * 3])
def test_a_correlation_that_is_not_known_is_no_reason_for_trust(unknown):
    made = graph()
    made["checks"]["correlation"]["strongest"] = unknown
    page = graph_page(made)
    assert 'class="warning"' in page
    assert "not known over the 40 edges of largest effect" in words(page)


def test_without_checks_it_says_that_there_are_none():
    page = graph_page(graph(checked=0))
    assert 'class="warning"' not in page
    assert "Not checked: how far these edges can be trusted is not known." in words(page)
    assert 'class="scatter"' not in page


def test_the_checked_edges_are_drawn_and_listed(page):
    assert page.count('class="scatter"') == 2
    assert page.count('<circle cx="') == 80
    assert "Checked edges (80 rows)" in page
    assert max(abs(float(x)) for x in re.findall(r'<circle cx="([^"]+)"', page)) <= 100


def test_the_strongest_edges_are_listed_without_the_script(page):
    made = graph()
    into = sorted((edge for edge in made["edges"] if edge[1] == len(made["nodes"]) - 1), key=lambda edge: -abs(edge[2]))
    table = page.partition("<h3>Into the output</h3>")[2].partition("</table>")[0]
    effects = re.findall(r"<td>Output</td><td>([^<]+)</td>", table)
    assert [float(one) for one in effects] == pytest.approx([edge[2] for edge in into[:LISTED]], abs=1e-3)
    between = page.partition("<h3>Between features</h3>")[2].partition("</table>")[0]
    assert between.count("<tr>") == LISTED + 1
    assert "Output" not in between


def test_the_script_gets_the_whole_graph(page):
    made, found = graph(), data(page)
    assert len(found["nodes"]) == len(made["nodes"])
    assert found["edges"] == [[one, other, float(f"{weight:.4g}")] for one, other, weight in made["edges"]]
    assert found["tokens"][3] == "\u2423243"
    assert {node["name"] for node in found["nodes"] if node["kind"] in ("rest", "output")} == {
        "Un-finetuned rest",
        "Output",
    }


def test_only_the_pages_own_script_may_run(page):
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in page
    assert not re.search(r"(src|href)=\"(https?:)?//", page)


def test_odd_tokens_are_text():
    made = graph(ODD)
    made["output"] |= {"finetuned": "<script>1</script>", "unfinetuned": "\n", "words": "logit of '</script>'"}
    made["nodes"][0]["promoted"] = ["</script><b>"]
    made["groups"][0]["fires_on"] = ["<img src=x onerror=alert(1)>"]
    made["facts"]["<i>fact</i>"] = "</table>"
    made["title"] = "<b>title</b>"
    page = graph_page(made)
    assert re.findall(r"<script[^>]*>", page) == ['<script type="application/json" id="data">', "<script>"]
    for markup in ("<img", "<b>", "<i>", "alert(1)</script>"):
        assert markup not in page
    assert "&lt;script&gt;1&lt;/script&gt;" in page
    assert page.encode("utf-8"), "nothing in it that cannot be written"
    assert "\u202e" not in page
    assert data(page)["tokens"][2:6] == ["\\u202ereversed", "\\x00", "\\ud800", ""]
    assert data(page)["tokens"][7] == "👩‍💻"


@pytest.mark.parametrize("card", ["javascript:alert(1)", "https://example.org", "//example.org", "/etc"])
def test_a_card_is_a_page_beside_it(card):
    made = graph()
    for node in made["nodes"]:
        node["card"] = card
    page = graph_page(made)
    assert card not in page
    assert {node["card"] for node in data(page)["nodes"]} == {""}


def test_the_smallest_graph_is_a_page():
    made = graph(["<bos>"], features=0, edges=0, groups=0, checked=0)
    assert len(made["nodes"]) == 1
    said = words(graph_page(made))
    assert "There are none in this graph." in said
    assert "Groups as one node" not in said


def test_nodes_have_names_in_plain_words():
    node = {"kind": "feature", "site_kind": "mlp", "layer": 12, "feature": 42}
    assert name(node) == "MLP of layer 12, feature 42"
    assert name({**node, "site_kind": "qkv"}) == "Queries, keys and values of layer 12, feature 42"
    assert name({**node, "kind": "bos", "feature": None}) == "MLP of layer 12 at BOS"


@pytest.mark.parametrize(
    ("token", "shown"), [(" a", "\u2423a"), ("\n", "\u23ce"), ("a\tb", "a\u21e5b"), ("\u200f", "\\u200f"), ("", "")]
)
def test_tokens_become_visible(token, shown):
    assert visible(token) == shown

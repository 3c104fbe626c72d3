"""The page of features: cards, the list's data, and that neither generated text nor a label can add markup."""

import base64
import hashlib
import json
import re

import pytest

from evaluators.report.feature_page import PAGE, SHOWN, address, feature_page, most_effective
from evaluators.report.page import Link
from evaluators.tables.feature_tables import features_table, ranking_table
from tests.evaluators.tables.test_feature_tables import card, cells, entries, ranked


@pytest.fixture(scope="module")
def page():
    return feature_page(cells(), features_table(cells()), ranking_table(cells()), "A and B.")


def test_a_card_for_each_feature_in_order(page):
    assert re.findall(r'<article class="card" id="([^"]+)"', page) == ["L6F004", "L2F001", "residual-L3F003"]
    assert "Layer 6, at bos" not in page
    assert "rank 2 of 4" in page
    assert "never fires there" in page


def test_generated_text_is_text(page):
    assert "&lt;b&gt;" in page
    assert "<b>c" not in page


def test_the_lists_data_is_complete_and_ends_no_element(page):
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert "<" not in text
    data = json.loads(text)
    assert len(data["list"]) == 7
    assert data["list"][0] == ["change", 6, 4, 1, 0.5, 0.25, 0.5, 1]
    assert data["cards"]["L2F001"]["ablated"] == [pytest.approx(0.105), 0]


def test_only_the_pages_own_script_may_run(page):
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert "default-src 'none'" in page
    assert not re.search(r"(src|href)=\"(https?:)?//", page)


@pytest.mark.parametrize(
    ("place", "expected"), [(("change", 17, 42), "L17F042"), (("residual", 3, 1234), "residual-L3F1234")]
)
def test_an_address_of_its_own(place, expected):
    assert address(*place) == expected


def test_the_report_names_the_first_few_and_leads_to_them():
    table = most_effective(features_table(cells()), "change")
    assert [row[1] for row in table.rows] == [
        Link("layer 6, at BOS", f"{PAGE}#L6F004"),
        Link("layer 2, feature 1", f"{PAGE}#L2F001"),
    ]
    assert len(table.rows) <= SHOWN
    assert most_effective(features_table([]), "change") is None


def attention_cells():
    """A feature of queries, keys and values, one of attention's output, and the latter as it was written before cards
    said what it reads."""
    ways = [[*entries("tool", shift), *entries("copy", 0.0)] for shift in (0.1, 0.2)]
    into_heads = card("4.qkv", 1, *ways, [["a", "<b>", "\n"]])
    into_heads |= {
        "promoted": [],
        "suppressed": [],
        "heads": {"q": [0.1, 0.4], "k": [0.3], "v": [0.2]},
        "patterns": [
            {
                "from": {"sizes": [0.02, 0.125], "head": 1, "changes": [0.12, -0.06, 0.0], "before": -0.06},
                "to": {"sizes": [0.0004, 0.0], "head": 0, "changes": [0.0, 0.0, 0.0004]},
            }
        ],
        "values": [{"head": 0, "promoted": [" <i>"], "suppressed": ["no"]}],
    }
    quiet = {way: {"sizes": [0.0], "head": 0, "changes": [0.0] * 3} for way in ("from", "to")}
    still = {**into_heads, "feature": 2, "patterns": [quiet], "values": []}
    unseen = {**into_heads, "feature": 3, "patterns": []}
    out = {**card("4.o", 0, *ways), "reads": [0.005, 0.7, 0.295]}
    old = card("4.o", 1, *ways)
    cards = [into_heads, still, unseen, out, old]
    common = {"target": "change", "percentile": None, "d_new": 9}
    listed = [ranked(one["layer"], one["feature"], 0.5 - place / 10) for place, one in enumerate(cards)]
    return [{"kind": "ranking", **common, "features": listed}, {"kind": "cards", **common, "cards": cards}]


@pytest.fixture(scope="module")
def of_attention():
    """The page's cards by address."""
    found = attention_cells()
    text = feature_page(found, features_table(found), ranking_table(found), "A and B.")
    cards = re.findall(r'<article class="card" id="([^"]+)">(.*?)</article>', text, re.DOTALL)
    return text, dict(cards)


def test_a_feature_of_attention_shows_whose_attention_moves(of_attention):
    text, cards = of_attention
    one = cards["L4-qkvF001"]
    assert (
        "<small>tool, head 1: what the outlined token attends to; 12.5% of its attention moves (head 0 2.0%); "
        "tokens before these: -6.0%</small>"
        '<i style="--a:1.00" title="+12.0%" class="gain">a</i>'
        '<i style="--a:0.50" title="-6.0%" class="loss peak">&lt;b&gt;</i>\u23ce</li>'
    ) in one
    assert "how much later tokens" not in one, "too little moves there"
    assert "no head moves as much" in cards["L4-qkvF002"]
    assert "What it does to attention" not in cards["L4-qkvF003"], "the model shows no patterns"
    assert '<i class="gain">gain</i>' in text


def test_a_feature_of_attention_shows_what_its_values_promote(of_attention):
    one = of_attention[1]["L4-qkvF001"]
    assert "Values of head 0 promote</h4><code>\u2423&lt;i&gt;</code>" in one
    assert "Values of head 0 suppress</h4><code>no</code>" in one
    assert "Values of head" not in of_attention[1]["L4-qkvF002"]
    assert "<h4>Promotes</h4>" not in one


def test_a_feature_of_attention_s_output_names_the_heads_that_it_reads(of_attention):
    assert "<h4>Which heads it reads</h4>\n<p>head 1 70%, head 2 30%</p>" in of_attention[1]["L4-oF000"]


def test_a_card_written_before_is_as_it_was(of_attention, page):
    new, old = of_attention[1]["L4-oF000"], of_attention[1]["L4-oF001"]
    assert "Which heads it reads" not in old
    without = re.sub(r"<h4>Which heads it reads</h4>\n<p>.*?</p>\n", "", new)
    assert without.partition("</table>")[2] == old.partition("</table>")[2]
    assert "attention" not in page.split('<div id="deck">')[1].split("<script")[0]
    assert "gain</i>" not in page

"""The page of features: cards, the list's data, and that neither generated text nor a label can add markup."""

import base64
import hashlib
import json
import re

import pytest

from evaluators.report.feature_page import PAGE, SHOWN, address, feature_page, most_effective
from evaluators.report.page import Link
from evaluators.tables.feature_tables import features_table, ranking_table
from tests.evaluators.tables.test_feature_tables import cells


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

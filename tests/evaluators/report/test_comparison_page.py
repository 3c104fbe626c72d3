"""The page, the tables and the rows of a comparison of made-up sweeps."""

import re

from evaluators.report import comparison_page
from evaluators.tables.compared_sweeps import ComparedSweep, from_metrics
from tests.evaluators.compared import sweep


def three() -> list[ComparedSweep]:
    return [sweep("a", 0, gap=1.0), sweep("b", 1, gap=3.0), sweep("wide <i>", 0, {"deltas": {"d_new": [16]}})]


def test_a_column_for_each_sweep():
    (table,) = comparison_page.side_by_side([*three(), from_metrics("tracked", {}, {"gap_ce_tool": 1.0})])
    assert table.header == ["", "a", "b", "wide <i>", "tracked"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["CE gap, nats per target token"][1:] == ["+3.000 [+2.900, +3.100]", "+2.000 [+1.900, +2.100]", "+1.000"]
    assert rows["features for 90%"] == ["4", "4", "4", "-"]
    assert rows["call rate, alpha 0"][0] == "0.000 [0.000, 0.000]"
    assert "n = 20" in table.help


def test_what_is_pooled_says_over_what():
    (table,) = comparison_page.pooled_tables(three())
    assert table.title == "2 adapters: a, b"
    assert "0, 1" in table.help
    gap = table.rows[0]
    assert gap == ["tool", "CE gap, nats per target token", "+2.000", "1.414", "+1.000 to +3.000", "2"]
    note = comparison_page.spread_note(three())
    assert "over adapters" in note
    assert "over prompts within one" in note
    assert comparison_page.pooled_tables(three()[1:]) == []


def test_the_page_loads_nothing_and_escapes_names():
    page = comparison_page.page(three(), ["a note"])
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!#|data:)', page)
    assert "wide &lt;i&gt;" in page
    assert "a note" in page
    assert page.count("data:image/png") == 1
    without = comparison_page.page([from_metrics(name, {"seed": 0}, {"gap_ce_tool": 1.0}) for name in "ab"])
    assert "data:image/png" not in without


def test_every_sweep_and_mean_is_in_the_picture():
    figure = comparison_page.knobs([*three(), sweep("c", 0, {"deltas": {"d_new": [32]}})])
    assert len(figure.axes) == 2
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["a", "b", "wide <i>", "c", "mean of 2 adapters"]
    means = [line for line in figure.axes[0].lines if line.get_label().startswith("mean")]
    assert means[0].get_xydata().tolist() == [[0.0, 2.5], [0.5, 1.5], [1.0, 0.5]]
    colours = {line.get_label(): line.get_color() for line in figure.axes[0].lines}
    assert colours["a"] == colours["b"] == colours["mean of 2 adapters"]
    assert len({colours["a"], colours["wide <i>"], colours["c"]}) == 3


def test_plain_rows_for_files():
    rows = comparison_page.records(three())
    assert {tuple(row) for row in rows} == {
        ("kind", "sweep", "seed", "subset", "figure", "value", "low", "high", "sd", "n")
    }
    one = rows[0]
    assert (one["kind"], one["sweep"], one["seed"], one["value"], one["sd"]) == ("sweep", "a", 0, 1.0, None)
    pooled = [row for row in rows if row["kind"] == "pooled"]
    assert (pooled[0]["sweep"], pooled[0]["value"], pooled[0]["n"], pooled[0]["low"]) == ("a, b", 2.0, 2, 1.0)
    assert len(rows) == 9 * 3 + 9

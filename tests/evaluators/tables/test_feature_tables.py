"""The tables of features: ranked by estimated effect, with what each changes alone and its intervals over prompts."""

import math

import pytest

from evaluators.tables.feature_tables import features_table, ranking_table


def entries(subset, shift, calls=1, spread=0.01):
    """Eight prompts of 10 tokens; the way adds `shift` nats a token, with spread, and `calls` prompts call."""
    return [
        {
            "subset": subset,
            "nll": 10 * (1 + shift + spread * (n % 2)) if shift else 10.0,
            "nll_whole": 10.0,
            "n_tokens": 10,
            "behaviours": {"tool_call": n < calls, "copy_exact": None},
            "behaviours_whole": {"tool_call": n < 4, "copy_exact": None},
        }
        for n in range(8)
    ]


def card(layer, feature, ablated, alone, contexts=()):
    return {
        "layer": layer,
        "feature": feature,
        "at_bos": feature == 4,
        "contexts": [
            {"subset": "tool", "tokens": tokens, "acts": [0.5, 2.0, 0.0][: len(tokens)], "peak": 1}
            for tokens in contexts
        ],
        "histogram": {"top": 2.0, "counts": [3, 0, 1]},
        "promoted": [" +", "\n"],
        "suppressed": ["a"],
        "ablated": ablated,
        "alone": alone,
    }


def ranked(layer, feature, effect):
    return {"layer": layer, "feature": feature, "effect": effect, "firing_rate": {"tool": 0.25, "copy": 0.5}}


def cells():
    both = [*entries("tool", 0.1), *entries("copy", 0.0, calls=4)]
    alone = [*entries("tool", -0.4, calls=4), *entries("copy", -0.2, calls=5)]
    of_change = {"target": "change", "percentile": None, "d_new": 4}
    of_residual = {"target": "residual", "percentile": 0.5, "d_new": 4}
    return [
        {"kind": "behaviour"},
        {
            "kind": "ranking",
            **of_change,
            "features": [ranked(6, 4, 0.5), ranked(2, 1, 0.3), ranked(6, 0, 0.1), ranked(2, 0, -0.2)],
        },
        {"kind": "ranking", **of_residual, "features": [ranked(3, 4 - 1, 0.2), ranked(3, 0, 0.0)]},
        {"kind": "ranking", **of_residual, "features": [ranked(1, 2, 0.4)]},
        {
            "kind": "cards",
            **of_change,
            "cards": [card(2, 1, both, alone, [["a", "<b>", "c"]]), card(6, 4, alone, both)],
        },
        {"kind": "cards", **of_residual, "cards": [card(3, 3, both, both)]},
    ]


def test_every_feature_is_ranked_within_its_target():
    table = ranking_table(cells())
    assert table[["target", "rank", "layer", "feature"]].values.tolist() == [
        ["change", 1, 6, 4],
        ["change", 2, 2, 1],
        ["change", 3, 6, 0],
        ["change", 4, 2, 0],
        ["residual", 1, 1, 2],
        ["residual", 2, 3, 3],
        ["residual", 3, 3, 0],
    ]
    assert table["at_bos"].tolist() == [True, *[False] * 6]
    assert set(table["firing_rate_copy"]) == {0.5}


def test_cards_come_in_order_of_rank_with_what_changes():
    table = features_table(cells())
    assert table[["target", "rank", "layer", "feature"]].values.tolist() == [
        ["change", 1, 6, 4],
        ["change", 2, 2, 1],
        ["residual", 2, 3, 3],
    ]
    second = table.iloc[1]
    assert second["ablated_ce_tool"] == pytest.approx(0.1 + 0.005)
    assert second["ablated_ce_tool_low"] < second["ablated_ce_tool"] < second["ablated_ce_tool_high"]
    assert second["alone_ce_tool"] == pytest.approx(-0.4 + 0.005)
    assert second["ablated_tool_call_rate_tool"] == pytest.approx(-3 / 8)
    assert second["ablated_tool_call_rate_copy"] == 0
    assert second["ablated_tool_call_rate_copy_low"] < 0 < second["ablated_tool_call_rate_copy_high"]
    assert second["ablated_ce_copy"] == 0
    assert math.isnan(second["ablated_ce_copy_low"]), "it never fires there: nothing was sampled"
    assert second["n_tool"] == 8
    assert second["promoted"] == "' +' '\\n'"
    assert second["contexts"] == "'a«<b>»c' (tool, 2)"
    assert "ablated_copy_exact_rate_tool" not in table


def test_no_cards_no_rows():
    assert features_table([]).empty
    assert features_table(cells()[:1]).empty
    assert ranking_table([]).empty


def test_rankings_of_earlier_versions_are_read():
    """They have no firing rates, and no target: all were of change deltas."""
    old = {"kind": "ranking", "d_new": 4, "features": [{"layer": 1, "feature": 0, "effect": 0.1}]}
    (row,) = ranking_table([old]).to_dict("records")
    assert (row["target"], row["rank"], row["at_bos"]) == ("change", 1, False)

"""The table of features: ordered by what their ablation changes, with intervals over prompts."""

import math

import pytest

from evaluators.report.feature_section import features_section
from evaluators.tables.feature_tables import features_table


def entries(shift, calls=1):
    """Eight prompts of 10 tokens; ablation adds `shift` nats a token, with spread, and `calls` prompts still call."""
    return [
        {
            "index": n,
            "nll": 10 * (1 + shift + 0.01 * (n % 2)),
            "nll_full": 10.0 + 0.05 * n,
            "n_tokens": 10,
            "behaviours": {"tool_call": n < calls, "copy_exact": None},
            "behaviours_full": {"tool_call": n < 4, "copy_exact": None},
        }
        for n in range(8)
    ]


def feature(number, attribution, ablation=None, contexts=()):
    return {
        "feature": number,
        "firing_rate": {"copy": 0.5, "tool": 0.25},
        "contexts": [{"subset": "tool", "activation": 2.0, "text": text} for text in contexts],
        "attribution": attribution,
        "promoted": [" +", "\n"],
        "suppressed": ["a"],
        "ablation": ablation,
    }


CELLS = [
    {"kind": "behaviour"},
    {
        "kind": "features",
        "layer": 6,
        "percentile": 0.5,
        "d_new": 4,
        "features": [
            feature(0, 0.1),
            feature(1, 0.5, {"tool": entries(0.1), "copy": entries(0.0)}, ["a «+» b"]),
            feature(2, -0.2),
            feature(3, 0.4, {"tool": entries(0.0), "copy": entries(-0.4, calls=4)}, ["<b>«x»"]),
        ],
    },
]


def test_features_are_ordered_by_effect_then_by_estimate():
    table = features_table(CELLS)
    assert table["feature"].tolist() == [3, 1, 2, 0]
    first = table.iloc[0]
    assert first["effect"] == first["delta_ce_copy"] == pytest.approx(-0.4 + 0.005 - 0.0175)
    assert first["delta_ce_copy_low"] < first["delta_ce_copy"] < first["delta_ce_copy_high"] < 0
    assert first["delta_tool_call_rate_tool"] == pytest.approx(-3 / 8)
    assert first["delta_tool_call_rate_copy"] == 0
    assert first["delta_tool_call_rate_copy_low"] < 0 < first["delta_tool_call_rate_copy_high"], "no change is no proof"
    assert math.isnan(table.iloc[2]["effect"])
    assert first["promoted"] == "' +' '\\n'"


def test_the_section_shows_what_was_measured():
    section = features_section(features_table(CELLS))
    effects, meanings = section.blocks
    assert "2 of 4 features were ablated" in effects.help
    assert [row[1] for row in effects.rows] == ["3", "1", "2", "0"]
    assert effects.header[2:4] == ["fires on copy", "fires on tool"]
    assert [row[1] for row in meanings.rows] == ["3", "1"], "those that fire somewhere"
    assert "<b>«x»" in meanings.rows[0][4]


def test_no_features_no_section():
    assert features_table([]).empty
    assert features_section(features_table(CELLS[:1])) is None

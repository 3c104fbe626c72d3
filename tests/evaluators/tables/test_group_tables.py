"""Tables of groups: differences and recovered shares by hand, and what a sweep without groups has."""

import pandas as pd
import pytest

from evaluators.report.groups_section import groups_section
from evaluators.tables.group_tables import group_curve_table, group_effects_table, groups_needed, groups_table
from evaluators.tables.tables import all_tables

TOKENS = [4, 6, 10]
NLL = {  # by configuration, nats per token of each prompt
    ("nothing", 0, False): 3.0,
    ("first", 0, False): 2.5,
    ("first", 1, False): 1.0,
    ("first", 2, False): 0.2,
    ("first", 1, True): 2.0,
    ("first", 2, True): 1.5,
    ("without", 0, False): 0.1,
    ("without", 1, False): 0.4,
    ("alone", 1, False): 1.0,
    ("without", 1, True): 0.15,
    ("alone", 1, True): 2.0,
}
WOBBLE = (1.0, 1.1, 0.9)
"""So that prompts differ, and intervals have a width."""


def rows(ce: float, calls: list[bool] | None = None) -> list[dict]:
    found = [
        {"index": place, "nll": ce * n * WOBBLE[place], "kl": 0.5 * ce * n, "n_tokens": n}
        for place, n in enumerate(TOKENS)
    ]
    return (
        found
        if calls is None
        else [{**row, "behaviours": {"call": call}} for row, call in zip(found, calls, strict=True)]
    )


def cells() -> list[dict]:
    entries = []
    for (way, group, random), ce in NLL.items():
        calls = None if random else [ce < 0.3, ce < 0.5, ce < 2]
        entries.append(
            {"way": way, "group": group, "random": random, "n_features": 10 * group, "rows": rows(ce, calls)}
        )
    groups = [
        {
            "number": number,
            "effect": 1.0 / number,
            "features": [["8", 1], ["8", 2], ["9.qkv", 4]],
            "fires_on": [[" <", 0.5], ["'", 0.2]],
            "contexts": [{"subset": "tool", "tokens": ["a", "<b>"], "acts": [0.2, 1.0], "peak": 1}],
            "promoted": ["call"],
        }
        for number in (1, 2)
    ]
    silhouette = {"chosen": 0.3, "held_out": 0.2, "permuted": -0.01}
    shared = {"target": "change", "layers": ["8", "9.qkv"], "percentile": None, "d_new": 8, "seed": 0}
    raw = {"kind": "behaviour", "condition": "raw", "subset": "tool", "rows": [*rows(0.1), *rows(9.0)], "layers": []}
    return [
        {
            "kind": "grouping",
            **shared,
            "n_live": 9,
            "cut": 0.4,
            "silhouette": silhouette,
            "groups": groups,
            "singles": [],
        },
        {"kind": "groups", **shared, "subset": "tool", "entries": entries},
        raw,
    ]


def mean(ce: float) -> float:
    return sum(ce * n * wobble for n, wobble in zip(TOKENS, WOBBLE, strict=True)) / sum(TOKENS)


def test_a_group_is_a_row():
    table = groups_table(cells())
    assert table["group"].tolist() == [1, 2]
    assert table[["n_features", "n_qkv", "n_o", "n_mlp", "n_layers"]].to_numpy().tolist() == [[3, 1, 0, 2, 2]] * 2
    assert table["layers"].tolist() == ["8-9"] * 2
    assert table["fires_on"].tolist() == ["' <' \"'\""] * 2


def test_effects_are_differences_from_all_deltas_and_from_the_features_at_bos():
    table = group_effects_table(cells()).set_index(["way", "random", "metric"])
    ce = {
        ("without", False): mean(0.4) - mean(0.1),
        ("without", True): mean(0.15) - mean(0.1),
        ("alone", False): mean(1.0) - mean(2.5),
        ("alone", True): mean(2.0) - mean(2.5),
    }
    for (way, random), expected in ce.items():
        row = table.loc[(way, random, "ce")]
        assert row["value"] == pytest.approx(expected)
        assert row["value_low"] <= row["value"] <= row["value_high"]
    assert table.loc[("alone", False, "kl"), "value"] == pytest.approx(0.5 * (1.0 - 2.5))
    assert table.loc[("without", False, "call_rate"), "value"] == pytest.approx(-1 / 3)
    assert ("without", True, "call_rate") not in table.index, "no behaviours of controls"
    assert set(table["group"]) == {1}, "the second was not measured alone"


def test_the_curve_goes_from_no_features_to_the_finetuned_model():
    curve = group_curve_table(cells())
    ours = curve[~curve["random"]].set_index("groups")
    assert ours["recovered"].to_dict() == pytest.approx(
        {count: (3.0 - ce) / 2.9 for count, ce in ((0, 2.5), (1, 1.0), (2, 0.2))}
    )
    assert ours["mean_ce"].to_dict() == pytest.approx({0: mean(2.5), 1: mean(1.0), 2: mean(0.2)})
    assert curve[curve["random"]]["groups"].tolist() == [1, 2]
    assert groups_needed(curve, "tool") == 2
    assert groups_needed(curve[curve["groups"] < 2], "tool") is None


def test_the_section_says_how_few_and_against_what():
    results = all_tables([])._replace(
        groups=groups_table(cells()), group_effects=group_effects_table(cells()), group_curve=group_curve_table(cells())
    )
    text = repr(groups_section(results, cells(), seed=0))
    assert "2 groups (20 features) bring back 0.966" in text
    assert "as many random features 0.517" in text
    assert "0.20 on the other half, -0.01" in text
    assert "<b>" in text, "escaped by the template, not here"


def test_without_groups_there_is_no_section_and_tables_are_empty():
    for table in (groups_table([]), group_effects_table([]), group_curve_table([])):
        assert isinstance(table, pd.DataFrame)
        assert table.empty
        assert len(table.columns)
    assert groups_section(all_tables([]), [], seed=0) is None

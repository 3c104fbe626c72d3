"""Gaps and recovered shares of invented cells: the arithmetic, and no share where there is nothing to recover."""

import math

import numpy as np
import pytest

from evaluators.tables import recovery
from evaluators.tables.statistics import recovered_share

PROMPTS = 12


def rows_of(shift, calls):
    """Prompts of 10 tokens with CE 0.5 + shift, a spread that is the prompt's own, and a share of calls."""
    noise = np.random.default_rng(3).normal(0, 0.02, PROMPTS)
    return [
        {
            "index": index,
            "nll": 10 * (0.5 + shift + noise[index]),
            "kl": 10 * abs(shift),
            "n_tokens": 10,
            "sum_abs_base_acts": 0.0,
            "sum_abs_delta_acts": 1.0,
            "n_act_tokens": 20,
            "behaviours": {"tool_call": index < calls * PROMPTS, "copy_exact": None},
        }
        for index in range(PROMPTS)
    ]


def cell(condition, shift, calls, layers=(0, 1, 2), alpha=None, subset="tool"):
    raw = condition in ("raw", "base_model_raw")
    return {
        "kind": "behaviour",
        "target": "" if raw else "change",
        "layers": [] if raw else list(layers),
        "percentile": None,
        "d_new": None if raw or condition in ("no_delta", "scaled_weights") else 8,
        "condition": condition,
        "alpha": alpha,
        "subset": subset,
        "convention": "",
        "seconds": 1.0,
        "seed": 0,
        "behaviours": ["tool_call", "copy_exact"],
        "rows": rows_of(shift, calls),
    }


CELLS = [
    cell("raw", 0.0, 1.0),
    cell("base_model_raw", 2.5, 0.0),
    cell("no_delta", 2.0, 0.0),
    cell("full", 0.1, 1.0),
    cell("alpha", 2.0, 0.0, alpha=0.0),
    cell("alpha", 0.5, 0.5, alpha=0.5),
    cell("alpha", 0.1, 1.0, alpha=1.0),
    cell("random_delta", 1.9, 0.0),
    cell("scaled_weights", 0.8, 0.5, alpha=0.5),
    cell("no_delta", 0.0, 1.0, layers=(5,)),
    cell("full", 0.0, 1.0, layers=(5,)),
]


def test_a_rate_on_which_all_prompts_agree_is_not_known_exactly():
    """All call at alpha 1 and none at 0: of 12 prompts that agree, up to a share of 1 - 0.05 ** (1 / 12) may not."""
    unseen = 1 - 0.05 ** (1 / PROMPTS)
    table = recovery.recovered_table(CELLS)
    where = {"layer": "0-2", "metric": "tool_call_rate"}
    full, random = (one(table, condition=name, **where) for name in ("full", "random_delta"))
    assert (full["recovered"], full["recovered_high"]) == (1.0, 1.0)
    assert full["recovered_low"] == pytest.approx(1 - unseen)
    assert (random["recovered"], random["recovered_low"]) == (0.0, 0.0)
    assert random["recovered_high"] == pytest.approx(unseen)
    half = one(table, condition="alpha", alpha=0.5, **where)
    assert 0 < half["recovered_low"] < half["recovered"] == 0.5 < half["recovered_high"] < 1


def one(table, **where):
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1, table
    return table.iloc[0]


def test_a_gap_and_its_share_of_the_whole_effect():
    gap = one(recovery.gap_table(CELLS), layer="0-2", metric="mean_ce")
    assert gap["gap"] == pytest.approx(2.0)
    assert gap["unfinetuned"] == pytest.approx(gap["raw"] + 2.5)
    assert gap["share"] == pytest.approx(0.8)
    assert gap["share_low"] <= gap["share"] <= gap["share_high"]
    rate = one(recovery.gap_table(CELLS), layer="0-2", metric="tool_call_rate")
    assert rate["gap"] == pytest.approx(-1.0)


def test_recovered_is_a_ratio_of_differences():
    table = recovery.recovered_table(CELLS)
    assert one(table, layer="0-2", metric="mean_ce", condition="full")["recovered"] == pytest.approx(0.95)
    half = one(table, layer="0-2", metric="mean_ce", condition="alpha", alpha=0.5)
    assert half["recovered"] == pytest.approx(0.75)
    assert one(table, layer="0-2", metric="tool_call_rate", condition="alpha", alpha=0.5)["recovered"] == 0.5
    random = one(table, layer="0-2", metric="mean_ce", condition="random_delta")
    assert random["recovered"] == pytest.approx(0.05)
    scaled = one(table, layer="0-2", metric="mean_ce", condition="scaled_weights")
    assert scaled["recovered"] == pytest.approx(0.6)
    assert one(table, layer="0-2", metric="kl", condition="full")["recovered"] == pytest.approx(0.95)


def test_without_a_gap_there_is_no_share():
    row = one(recovery.recovered_table(CELLS), layer="5", metric="mean_ce", condition="full")
    assert math.isnan(row["recovered"])
    assert row["gap_low"] <= 0 <= row["gap_high"]


def test_the_interval_of_a_share_covers_the_share_of_other_prompts():
    generator = np.random.default_rng(0)
    tokens = np.ones(40)
    ground, raw = 2 + generator.normal(0, 0.3, 40), generator.normal(0, 0.1, 40)
    spliced = raw + 0.2 * (ground - raw) + generator.normal(0, 0.1, 40)
    found = recovered_share((ground, tokens), (spliced, tokens), (raw, tokens))
    assert found.low < 0.8 < found.high
    assert found.high - found.low < 0.1
    assert math.isnan(recovered_share((raw, tokens), (spliced, tokens), (raw, tokens)).value)


def curve_cell(shifts):
    counts = [
        {
            "k": k,
            "rows": [{name: row[name] for name in ("index", "nll", "kl", "n_tokens")} for row in rows_of(shift, 1)],
        }
        for k, shift in shifts.items()
    ]
    return {"kind": "curve", "layers": [0, 1, 2], "d_new": 8, "subset": "tool", "counts": counts}


def test_the_smallest_count_that_is_enough():
    cells = [*CELLS, curve_cell({0: 2.0, 1: 1.0, 2: 0.3, 4: 0.1, 24: 0.1})]
    curve = recovery.curve_table(cells)
    assert curve.set_index("k")["recovered"].round(6).to_dict() == {0: 0.0, 1: 0.5, 2: 0.85, 4: 0.95, 24: 0.95}
    assert recovery.features_needed(curve, "tool") == 4
    assert recovery.features_needed(curve, "copy") is None
    found = recovery.headlines(recovery.gap_table(cells), recovery.recovered_table(cells), curve)
    assert found["features_for_90_percent_tool"] == 4
    assert found["recovered_ce_tool"] == pytest.approx(0.95)
    assert found["recovered_ce_random_tool"] == pytest.approx(0.05)
    assert found["mlp_share_ce_tool"] == pytest.approx(0.8)


def test_other_widths_have_a_table_of_their_own():
    """Beside the chosen width's same cells; in no other table do they appear."""
    wider = {"kind": "width", "d_new": 32}
    cells = [*CELLS, cell("full", 0.0, 1.0) | wider, cell("dense_delta", 0.4, 0.5) | wider]
    table = recovery.widths_table(cells)
    found = {(row.condition, row.d_new): row.recovered for row in table[table["metric"] == "mean_ce"].itertuples()}
    assert found == pytest.approx({("full", 8): 0.95, ("full", 32): 1.0, ("dense_delta", 32): 0.8})
    assert set(table["layer"]) == {"0-2"}
    assert recovery.recovered_table(cells).equals(recovery.recovered_table(CELLS))
    assert recovery.widths_table(CELLS).empty


def test_unexplained_by_subset_and_part():
    rows = [
        {"subset": "tool", "part": part, "change": 4.0, "left": left, "active": 6, "n_tokens": 3}
        for left, part in ((1.0, "prompt"), (3.0, "target"), (1.0, "prompt"), (1.0, "target"))
    ]
    cells = [{"kind": "change", "d_new": 8, "layers": [{"layer": 4, "rows": rows}]}]
    table = recovery.change_table(cells).set_index("part")
    assert table["unexplained"].to_dict() == {"prompt": 0.25, "target": 0.5}
    assert table["l0"].to_dict() == {"prompt": 2.0, "target": 2.0}


def parts_cell(whole, shifts, subset="tool"):
    """CE `whole` above the finetuned model without finetuning; `shifts` by part, layers and way."""

    def rows(shift):
        return [{name: row[name] for name in ("index", "nll", "n_tokens")} for row in rows_of(shift, 1)]

    parts = [
        {"part": part, "layers": layers, "way": way, "rows": rows(shift)}
        for (part, layers, way), shift in shifts.items()
    ]
    return {"kind": "parts", "subset": subset, "finetuned": rows(0.0), "unfinetuned": rows(whole), "parts": parts}


SHIFTS = {
    ("values", "all", "unfinetuned"): 0.5,
    ("values", "all", "finetuned"): 1.6,
    ("mlp", "all", "unfinetuned"): 1.5,
    ("mlp", "all", "finetuned"): 0.4,
    ("all", "0-3", "unfinetuned"): 0.2,
    ("all", "0-3", "finetuned"): 2.2,
}


def test_what_is_lost_without_a_part_and_what_it_brings_alone():
    table = recovery.parts_table([*CELLS, parts_cell(2.0, SHIFTS)])
    assert list(table.columns) == recovery.PARTS_COLUMNS
    shares = {(row.part, row.layers, row.way): row.share for row in table.itertuples()}
    assert shares == pytest.approx(dict(zip(SHIFTS, (0.25, 0.2, 0.75, 0.8, 0.1, -0.1), strict=True)))
    assert (table["share_low"] <= table["share"]).all()
    assert (table["share"] <= table["share_high"]).all()
    assert (table["n_examples"] == PROMPTS).all()
    raw = one(recovery.gap_table(CELLS), layer="0-2", metric="mean_ce")["raw"]
    assert table["mean_ce"].to_list() == pytest.approx([raw + shift for shift in SHIFTS.values()])


def test_without_a_whole_effect_no_part_has_a_share():
    cell = parts_cell(0.0, {("mlp", "all", "unfinetuned"): 0.1})
    cell["unfinetuned"] = [row | {"nll": row["nll"] + 0.5 * (-1) ** row["index"]} for row in cell["finetuned"]]
    (row,) = recovery.parts_table([cell]).itertuples()
    assert math.isnan(row.share)
    assert row.mean_ce == pytest.approx(0.6, abs=0.02)
    assert recovery.parts_table(CELLS).empty

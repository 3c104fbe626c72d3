"""Tables from cells small enough to compute on paper."""

import math

import pandas as pd
import pytest

from evaluators.tables.pooling import pool
from evaluators.tables.statistics import wilson
from evaluators.tables.tables import (
    behaviour_columns,
    combination_summary,
    conditions_table,
    delta_contrast_table,
    dose_response_statistics,
    dose_response_table,
    reconstruction_table,
)
from sites import label_order


def prompt(index, nll, tool_call=True, *, tokens=10, math_correct=True, copy_exact=None, delta_acts=2.0):
    return {
        "index": index,
        "nll": nll,
        "n_tokens": tokens,
        "sum_abs_base_acts": 30.0,
        "sum_abs_delta_acts": delta_acts,
        "n_act_tokens": 20,
        "behaviours": {
            "tool_call": tool_call,
            "valid_tool_format": tool_call,
            "math_correct": math_correct,
            "copy_exact": copy_exact,
        },
    }


BEHAVIOURS = ["tool_call", "valid_tool_format", "math_correct", "copy_exact"]


def behaviour(condition, rows, *, layers=(8,), alpha=None, subset="tool", percentile=0.5, d_new=128, seed=0):
    raw = condition in ("raw", "base_model_raw")
    return {
        "kind": "behaviour",
        "target": "" if raw else "residual",
        "layers": [] if raw else list(layers),
        "percentile": None if raw else percentile,
        "d_new": None if raw else d_new,
        "condition": condition,
        "alpha": alpha,
        "subset": subset,
        "convention": "ln2.hook_normalized",
        "seconds": 1.0,
        "seed": seed,
        "behaviours": BEHAVIOURS,
        "rows": rows,
    }


def reconstruction(layer, percentile, d_new, dce_full, **changes):
    return {
        "kind": "reconstruction",
        "layer": layer,
        "percentile": percentile,
        "d_new": d_new,
        "base": "layer_8/width_2304/average_l0_31",
        "convention": "ln2.hook_normalized",
        "n_tokens": 100,
        **{f"mean_cos_{name}": value for name, value in (("base", 0.8), ("full", 0.9))},
        **{f"mean_l2_{name}": value for name, value in (("base", 0.5), ("full", 0.4))},
        "fvu_base": 0.3,
        "fvu_full": 0.2,
        "l0_base": 30.0,
        "l0_delta": 5.0,
        "ce_raw": 1.0,
        "ce_base": 1.2,
        "ce_full": 1.0 + dce_full,
        "dce_base": 0.2,
        "dce_full": dce_full,
        "ce_zero": 3.0,
        "ce_recovered_base": 0.9,
        "ce_recovered_full": 0.95,
        "seconds": 1.0,
    } | changes


RAW = behaviour("raw", [prompt(0, 10.0), prompt(1, 40.0, tokens=20)])


def test_a_condition_of_the_base_model_is_held_against_that_model():
    before = behaviour("base_model_raw", [prompt(0, 30.0), prompt(1, 60.0, tokens=20)])
    spliced = behaviour("base_model_no_delta", [prompt(0, 33.0), prompt(1, 72.0, tokens=20)])
    table = conditions_table([RAW, before, spliced]).set_index("condition")
    assert table.delta_ce["base_model_no_delta"] == pytest.approx((105 - 90) / 30)
    assert table.delta_ce["base_model_raw"] == pytest.approx((90 - 50) / 30)
    assert math.isnan(conditions_table([RAW, spliced]).set_index("condition").delta_ce["base_model_no_delta"])


def test_reconstruction_is_sorted_and_summarised_over_layers():
    cells = [
        reconstruction(20, 0.5, 128, 0.3),
        reconstruction(8, 0.5, 128, 0.1, mean_cos_full=0.7),
        reconstruction(8, 0.5, 32, 0.4),
        RAW,
    ]
    table = reconstruction_table(cells)
    assert list(zip(table["layer"], table["d_new"], strict=True)) == [(8, 32), (8, 128), (20, 128)]
    summary = combination_summary(table)
    assert list(summary.columns) == [
        *("mean_dce_full", "max_dce_full", "mean_dce_base", "mean_cos_full", "mean_cos_base"),
        *("mean_l2_full", "mean_l2_base", "d_new", "percentile"),
    ]
    wide = summary[summary["d_new"] == 128].iloc[0]
    assert wide["mean_dce_full"] == pytest.approx(0.2)
    assert wide["max_dce_full"] == pytest.approx(0.3)
    assert wide["mean_cos_full"] == pytest.approx(0.8)
    assert wide["mean_l2_base"] == pytest.approx(0.5)


def test_a_base_chosen_by_target_l0_has_no_percentile_and_keeps_its_summary():
    summary = combination_summary(reconstruction_table([reconstruction(8, None, 64, 0.1)]))
    assert summary["mean_dce_full"].tolist() == [0.1]


def test_condition_row_by_hand():
    full = behaviour(
        "full",
        [prompt(1, 44.0, tokens=20, delta_acts=6.0), prompt(0, 13.0, False, math_correct=False)],
        alpha=1.0,
    )
    table = conditions_table([full, RAW])
    assert list(table.columns) == behaviour_columns([f"{name}_rate" for name in BEHAVIOURS])
    raw, row = table.iloc[0], table.iloc[1]
    assert (raw["layer"], row["layer"]) == ("none", "8")
    assert raw["mean_ce"] == pytest.approx(50 / 30)
    assert (raw["delta_ce"], raw["delta_ce_low"], raw["delta_tool_call_rate_high"]) == (0.0, 0.0, 0.0)
    assert row["mean_ce"] == pytest.approx(57 / 30)
    assert row["delta_ce"] == pytest.approx(7 / 30)  # per-prompt means would give (0.3 + 0.2) / 2
    # Resamples of two prompts: 0.3 twice, 0.2 twice or both.
    assert (row["delta_ce_low"], row["delta_ce_high"]) == pytest.approx((0.2, 0.3))
    assert row["tool_call_rate"] == 0.5
    assert (row["tool_call_rate_low"], row["tool_call_rate_high"]) == wilson(1, 2)
    assert row["delta_tool_call_rate"] == -0.5
    assert row["mean_abs_base_acts"] == pytest.approx(1.5)
    assert row["mean_abs_delta_acts"] == pytest.approx(8 / 40)
    assert (row["n_examples"], row["n_tokens"], row["n_math_correct"]) == (2, 30, 2)
    assert math.isnan(row["copy_exact_rate"])
    assert math.isnan(row["delta_copy_exact_rate"])


def test_unchanged_rates_do_not_claim_certainty():
    rows = [prompt(index, 10.0) for index in range(20)]
    row = conditions_table([behaviour("raw", rows), behaviour("no_delta", rows)]).iloc[1]
    assert row["delta_tool_call_rate"] == 0.0
    assert row["delta_tool_call_rate_high"] == pytest.approx(1 - 0.05 ** (1 / 20))
    assert row["delta_tool_call_rate_low"] == -row["delta_tool_call_rate_high"]


def test_differences_pair_by_prompt_number():
    only_second = behaviour("no_delta", [prompt(1, 50.0, tokens=20)], d_new=None)
    row = conditions_table([RAW, only_second]).iloc[1]
    assert row["delta_ce"] == pytest.approx(10 / 20)
    assert row["n_examples"] == 1
    assert math.isnan(row["delta_ce_low"])


def test_no_raw_on_a_subset_leaves_differences_empty():
    table = conditions_table([behaviour("full", [prompt(0, 10.0)], alpha=1.0)])
    assert table["mean_ce"].tolist() == [1.0]
    assert table["delta_ce"].isna().all()


def test_replicas_are_averaged_and_do_not_add_prompts():
    replicas = [
        behaviour("full", [prompt(0, 10.0), prompt(1, 44.0, called, tokens=20)], alpha=1.0, seed=seed)
        for seed, called in enumerate((True, False))
    ]
    row = conditions_table([RAW, *replicas]).iloc[1]
    assert (row["n_examples"], row["n_tokens"], row["n_replicas"]) == (2, 30, 2)
    assert row["tool_call_rate"] == 0.75
    assert (row["tool_call_rate_low"], row["tool_call_rate_high"]) == wilson(1.5, 2)
    different = behaviour("full", [prompt(7, 1.0)], alpha=1.0, seed=3)
    with pytest.raises(ValueError, match="different prompts"):
        pool([*replicas, different])


def test_replicas_may_judge_different_prompts():
    """A check that gives no verdict on some texts: the rate is that of the verdicts, and its interval has no more."""
    verdicts = ((True, True, True), (True, None, None))
    replicas = [
        behaviour("full", [prompt(index, 10.0, called) for index, called in enumerate(seen)], alpha=1.0, seed=seed)
        for seed, seen in enumerate((*verdicts, (False, True, None)))
    ]
    row = conditions_table([RAW, *replicas]).iloc[1]
    assert row["tool_call_rate"] == pytest.approx(5 / 6)
    assert (row["tool_call_rate_low"], row["tool_call_rate_high"]) == pytest.approx(wilson(5 / 3, 2))
    every = [behaviour("full", cell["rows"], alpha=1.0, seed=cell["seed"]) for cell in replicas[:2]]
    assert conditions_table([RAW, *every]).iloc[1]["tool_call_rate"] == 1.0


def test_no_delta_is_one_row_whatever_d_new_it_was_filed_under():
    cells = [RAW, *(behaviour("no_delta", RAW["rows"], d_new=width) for width in (32, None))]
    table = conditions_table(cells)
    assert table["condition"].tolist() == ["raw", "no_delta"]
    assert table["n_replicas"].tolist() == [1, 1]
    assert table["alpha"].tolist()[1] == 0.0


def test_alpha_cells_fill_the_dose_response_table_only():
    doses = [behaviour("alpha", [prompt(0, 10 - 4 * a), prompt(1, 20 - 4 * a)], alpha=a) for a in (1.0, 0.0, 0.5)]
    table = dose_response_table([RAW, *doses])
    assert table["alpha"].tolist() == [0.0, 0.5, 1.0]
    assert table["mean_ce"].tolist() == pytest.approx([1.5, 1.3, 1.1])
    assert conditions_table([RAW, *doses])["condition"].tolist() == ["raw"]


def test_dose_response_slope_by_hand():
    doses = [
        behaviour("alpha", [prompt(0, 10 - 4 * a), prompt(1, 20 - 4 * a, tool_call=a > 0.3)], alpha=a)
        for a in (0.0, 0.5, 1.0)
    ]
    statistics = dose_response_statistics(doses).set_index("metric")
    ce = statistics.loc["mean_ce"]
    assert ce["slope"] == pytest.approx(-0.4)
    assert (ce["slope_low"], ce["slope_high"]) == pytest.approx((-0.4, -0.4))
    assert ce["spearman"] == pytest.approx(-1.0)
    assert (ce["n_alphas"], ce["n_examples"]) == (3, 2)
    calls = statistics.loc["tool_call_rate"]  # 0.5, 1, 1 at 0, 0.5, 1
    assert calls["slope"] == pytest.approx(0.5)
    assert calls["spearman"] == pytest.approx(math.sqrt(3) / 2)
    assert "copy_exact_rate" not in statistics.index
    assert dose_response_statistics(doses[:1]).empty


def test_contrast_is_full_minus_no_delta_over_shared_prompts():
    no_delta = behaviour("no_delta", [prompt(0, 14.0), prompt(1, 48.0, tokens=20)], d_new=None)
    full = behaviour("full", [prompt(0, 11.0), prompt(1, 42.0, tokens=20)], alpha=1.0)
    row = delta_contrast_table([RAW, no_delta, full]).iloc[0]
    assert row["delta_ce"] == pytest.approx(-9 / 30)
    assert (row["delta_ce_low"], row["delta_ce_high"]) == pytest.approx((-0.3, -0.3))
    assert row["d_new"] == 128
    assert delta_contrast_table([RAW, full]).empty


def test_layers_sort_by_number_and_sets_come_last():
    cells = [RAW] + [behaviour("full", RAW["rows"], layers=layers, alpha=1.0) for layers in ([16, 8], [20], [8])]
    assert conditions_table(cells)["layer"].tolist() == ["none", "8", "20", "8+16"]
    assert sorted(["8+16", "20", "none", "8"], key=label_order) == ["none", "8", "20", "8+16"]


def test_subsets_are_in_the_order_of_the_cells():
    cells = [behaviour("raw", RAW["rows"], subset=subset) for subset in ("zebra", "ape", "cow")]
    assert conditions_table(cells)["subset"].tolist() == ["zebra", "ape", "cow"]


def test_no_cells_give_empty_tables():
    for table in (conditions_table([]), dose_response_table([]), reconstruction_table([])):
        assert isinstance(table, pd.DataFrame)
        assert table.empty
    assert combination_summary(reconstruction_table([])).empty

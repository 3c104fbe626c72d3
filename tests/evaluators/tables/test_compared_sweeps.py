"""Sweeps side by side, on made-up tables: which settings differ, and means over seeds by hand."""

import math

import pytest

from evaluators.tables import compared_sweeps
from evaluators.tables.compared_sweeps import FEATURES, GAP, SHARE
from tests.evaluators.compared import made, sweep


def test_the_figures_of_the_largest_set_of_layers():
    one = sweep("one")
    figures = one.figures.set_index("figure")
    assert one.layers == "0-2"
    assert one.rate == "call_rate"
    assert figures["value"].to_dict() == {
        GAP: 2.0,
        SHARE: 0.8,
        "CE recovered, alpha 1": 0.9,
        "KL recovered, alpha 1": 0.8,
        "CE recovered, random directions": -0.1,
        "call rate, alpha 0": 0.0,
        "call rate, alpha 1": 1.0,
        "call rate, finetuned": 1.0,
        FEATURES: 4,
    }
    assert figures.loc[GAP, ["low", "high"]].tolist() == [1.9, 2.1]
    assert figures.loc["call rate, alpha 1", "low"] == 0.5
    assert math.isnan(figures.loc[FEATURES, "low"])
    assert math.isnan(sweep("two", enough=None).figures.set_index("figure").loc[FEATURES, "value"])


def test_without_change_deltas_there_is_nothing_to_compare():
    tables = made()
    none = tables._replace(gaps=tables.gaps.assign(target="residual"))
    with pytest.raises(ValueError, match="no change deltas"):
        compared_sweeps.from_tables("one", {}, none)
    with pytest.raises(ValueError, match="no change deltas"):
        compared_sweeps.from_metrics("one", {}, {"recovered_ce_tool": 1.0})


def test_figures_of_a_tracker_are_the_same_by_other_names():
    metrics = {
        "gap_ce_tool": 2.0,
        "gap_ce_tool_low": 1.9,
        "gap_kl_tool": 1.5,
        "mlp_share_ce_tool": 0.8,
        "recovered_ce_tool": 0.9,
        "recovered_ce_tool_low": 0.85,
        "recovered_ce_random_tool": -0.1,
        "features_for_90_percent_tool": 4.0,
    }
    figures = compared_sweeps.from_metrics("one", {}, metrics).figures
    assert set(figures["subset"]) == {"tool"}, "the end of an interval is no subset"
    figures = figures.set_index("figure")
    assert figures["value"].to_dict() == {
        GAP: 2.0,
        SHARE: 0.8,
        FEATURES: 4.0,
        "CE recovered, alpha 1": 0.9,
        "CE recovered, random directions": -0.1,
    }
    assert figures.loc[GAP, "low"] == 1.9
    assert figures.loc["CE recovered, alpha 1", "low"] == 0.85


def test_the_settings_that_differ():
    other = {"lora": {"space": {"lr": {"low": 0.002}}}, "deltas": {"d_new": [8, 16]}, "storage": {"root": "elsewhere"}}
    other |= {"compute": {"precision": "bf16", "max_concurrent": 2}, "evaluate": {"curve": True}}
    pair = [sweep("one"), sweep("two", 1, other)]
    assert compared_sweeps.settings_that_differ(pair) == {
        "seed": [0, 1],
        "lora.space.lr.low": [0.001, 0.002],
        "deltas.d_new": [[8], [8, 16]],
        "compute.precision": ["auto", "bf16"],
        "evaluate.curve": [None, True],
    }
    same = [sweep("one"), sweep("two", settings={"lora": {"space": {"lr": {"low": 1e-3, "high": None}}}})]
    assert compared_sweeps.settings_that_differ(same) == {}


def test_pooling_by_hand():
    group = [sweep("a", 0, gap=1.0, enough=4), sweep("b", 1, gap=2.0, enough=None), sweep("c", 2, gap=6.0, enough=16)]
    table = compared_sweeps.pooled(group).set_index("figure")
    assert table.loc[GAP, ["mean", "low", "high", "n"]].tolist() == [3.0, 1.0, 6.0, 3]
    assert table.loc[GAP, "sd"] == pytest.approx(math.sqrt((4 + 1 + 9) / 2))
    assert table.loc[GAP, "sweeps"] == "a, b, c"
    assert table.loc[FEATURES, ["mean", "low", "high", "n"]].tolist() == [10.0, 4.0, 16.0, 2]
    assert table.loc["KL recovered, alpha 1", "sd"] == pytest.approx(0)


def test_only_sweeps_that_differ_in_the_seed_alone_are_pooled():
    wide = {"deltas": {"d_new": [16]}}
    run_elsewhere = {"storage": {"root": "elsewhere"}, "compute": {"precision": "auto", "max_concurrent": 2}}
    sweeps = [
        sweep("a", 0),
        sweep("wide", 0, wide),
        sweep("b", 1, run_elsewhere),
        sweep("again", 1),
        sweep("alone", 3, {"deltas": {"d_new": [32]}}),
        sweep("wider", 4, wide),
    ]
    groups = [[one.name for one in group] for group in compared_sweeps.seed_groups(sweeps)]
    assert groups == [["a", "b"], ["wide", "wider"]], "a seed counts once"
    assert compared_sweeps.repeated(sweeps) == [("b", "again")]
    assert compared_sweeps.unit_of(sweeps) == "adapters"
    adopted = sweep("a", settings={"model": {"source": "m", "finetuned": "f"}})
    assert compared_sweeps.unit_of([adopted]) == "seeds"

"""Made-up sweeps for the tests of comparisons.

In: a name, a seed, settings and a few figures. Out: the tables of a report, and what is compared of them.
"""

import math

import pandas as pd

from evaluators.tables import compared_sweeps
from evaluators.tables.compared_sweeps import ReportTables

SETTINGS = {
    "name": "one",
    "seed": 0,
    "model": {"source": "m", "finetuned": None},
    "lora": {"space": {"lr": {"low": 0.001}}},
    "deltas": {"d_new": [8]},
    "compute": {"precision": "auto", "max_concurrent": None},
    "storage": {"root": "mlruns"},
}


def made(gap: float = 2.0, recovered: float = 0.9, calls: float = 1.0, enough: int | None = 4) -> ReportTables:
    place = {"target": "change", "layer": "0-2", "subset": "tool"}
    gaps = [
        {**place, "layer": layer, "metric": "mean_ce", "gap": value, "gap_low": value - 0.1, "gap_high": value + 0.1}
        | {"share": 0.8, "share_low": 0.7, "share_high": 0.9, "n_examples": 20}
        for layer, value in (("1", 0.1), ("0-2", gap))
    ]
    shares = [
        {**place, "condition": condition, "metric": metric, "alpha": 1.0}
        | {"recovered": value, "recovered_low": value - 0.05, "recovered_high": value + 0.05}
        for condition, metric, value in [
            ("full", "mean_ce", recovered),
            ("full", "kl", recovered - 0.1),
            ("random_delta", "mean_ce", -0.1),
            ("alpha", "mean_ce", 0.5),
        ]
    ]
    conditions = [
        {"target": target, "layer": layer, "subset": "tool", "condition": condition, "mean_ce": ce, "n_examples": 20}
        | {"delta_call_rate": 0.5, "other_rate": math.nan}
        | {"call_rate": rate, "call_rate_low": rate / 2, "call_rate_high": rate}
        for target, layer, condition, ce, rate in [
            (None, "none", "raw", 0.5, 1.0),
            ("change", "0-2", "no_delta", 0.5 + gap, 0.0),
            ("change", "0-2", "full", 0.6, calls),
            ("residual", "0-2", "full", 9.0, 0.25),
        ]
    ]
    curve = [{"subset": "tool", "k": k, "recovered": 0.95 if enough and k >= enough else 0.2} for k in (1, 4, 16)]
    dose = [
        {**place, "condition": "alpha", "alpha": alpha, "mean_ce": 0.5 + gap * (1 - alpha), "n_examples": 20}
        | {"mean_ce_low": 0.4, "mean_ce_high": 3.0, "call_rate": alpha, "call_rate_low": 0.0, "call_rate_high": 1.0}
        for alpha in (1.0, 0.0, 0.5)
    ]
    return ReportTables(*map(pd.DataFrame, (gaps, shares, conditions, curve, dose)))


def sweep(name: str, seed: int = 0, settings: dict | None = None, **tables: float) -> compared_sweeps.ComparedSweep:
    merged = SETTINGS | {"name": name, "seed": seed} | (settings or {})
    return compared_sweeps.from_tables(name, compared_sweeps.flat(merged), made(**tables), "here")

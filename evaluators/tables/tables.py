"""Finished evaluation cells become tables.

In: the JSON files of `<sweep>/cells/` (one per reconstruction or behaviour cell, per-prompt sums in `rows`).
Out: pandas tables: reconstruction and its summary over layers, conditions, dose-response, full against no_delta.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from evaluators.conditions import CONDITIONS, UNEDITED
from evaluators.tables import recovery
from evaluators.tables.feature_tables import features_table, ranking_table
from evaluators.tables.group_tables import group_curve_table, group_effects_table, groups_table
from evaluators.tables.pooling import MEANS, RATE, Cell, CellKey, PromptSums, of_kind, pool, rates_of, table_order
from evaluators.tables.statistics import Estimate, paired_bootstrap, rate_difference, slope_and_spearman, wilson

RECONSTRUCTION_COLUMNS = [
    *("layer", "percentile", "d_new", "base", "convention", "n_tokens"),
    *("mean_cos_base", "mean_cos_full", "mean_l2_base", "mean_l2_full", "fvu_base", "fvu_full"),
    *("l0_base", "l0_delta", "ce_raw", "ce_base", "ce_full", "dce_base", "dce_full"),
    *("ce_zero", "ce_recovered_base", "ce_recovered_full", "seconds"),
]
KEY_TYPES = {"d_new": "Int64", "percentile": "float64", "alpha": "float64"}
SUMMARY_METRICS = [
    *("mean_dce_full", "max_dce_full", "mean_dce_base"),
    *("mean_cos_full", "mean_cos_base", "mean_l2_full", "mean_l2_base"),
]


def behaviour_columns(rates: Sequence[str]) -> list[str]:
    """The reference study's columns, in its order, with these rates; then our own."""
    differences = [f"delta_{rate}" for rate in rates]
    bounded = ["mean_ce", "delta_ce", *rates, *differences, *list(MEANS)[1:]]
    return [
        *("layer", "subset", "condition", "alpha", "d_new", "percentile", "mean_ce", "delta_ce", *rates),
        *("mean_abs_base_acts", "mean_abs_delta_acts", "n_examples", "n_tokens", "target", "kl", *differences),
        *(f"{name}_{end}" for name in bounded for end in ("low", "high")),
        *(_count_of(rate) for rate in rates),
        *("n_replicas", "convention"),
    ]


def _count_of(rate: str) -> str:
    """The column with the number of prompts on which the rate is defined."""
    return f"n_{rate.removesuffix(RATE)}"


class Results(NamedTuple):
    """Every table of one sweep."""

    parts: pd.DataFrame
    gaps: pd.DataFrame
    recovered: pd.DataFrame
    widths: pd.DataFrame
    curve: pd.DataFrame
    ranking: pd.DataFrame
    change: pd.DataFrame
    reconstruction: pd.DataFrame
    summary: pd.DataFrame
    conditions: pd.DataFrame
    contrast: pd.DataFrame
    dose: pd.DataFrame
    statistics: pd.DataFrame
    features: pd.DataFrame
    groups: pd.DataFrame
    group_effects: pd.DataFrame
    group_curve: pd.DataFrame


def all_tables(cells: Sequence[Cell], *, seed: int = 0) -> Results:
    """Every table of the functions below, from the cells of one sweep."""
    reconstruction = reconstruction_table(cells)
    return Results(
        recovery.parts_table(cells, seed=seed),
        recovery.gap_table(cells, seed=seed),
        recovery.recovered_table(cells, seed=seed),
        recovery.widths_table(cells, seed=seed),
        recovery.curve_table(cells, seed=seed),
        ranking_table(cells),
        recovery.change_table(cells, seed=seed),
        reconstruction,
        combination_summary(reconstruction),
        conditions_table(cells, seed=seed),
        delta_contrast_table(cells, seed=seed),
        dose_response_table(cells, seed=seed),
        dose_response_statistics(cells, seed=seed),
        features_table(cells, seed=seed),
        groups_table(cells),
        group_effects_table(cells, seed=seed),
        group_curve_table(cells, seed=seed),
    )


def reconstruction_table(cells: Iterable[Cell]) -> pd.DataFrame:
    """One row per reconstruction cell (layer x percentile x d_new); `layer` is a number here."""
    rows = [{name: cell.get(name) for name in RECONSTRUCTION_COLUMNS} for cell in of_kind(cells, "reconstruction")]
    table = pd.DataFrame(rows, columns=RECONSTRUCTION_COLUMNS)
    return table.sort_values(["layer", "percentile", "d_new"], kind="stable", ignore_index=True)


def combination_summary(table: pd.DataFrame) -> pd.DataFrame:
    """The reconstruction table averaged over layers: one row per (d_new, percentile).

    A combination is averaged over the layers it has; the report says where layers are missing.
    """
    grouped = table.groupby(["d_new", "percentile"], sort=True, dropna=False)
    summary = pd.DataFrame(
        {
            "mean_dce_full": grouped["dce_full"].mean(),
            "max_dce_full": grouped["dce_full"].max(),
            "mean_dce_base": grouped["dce_base"].mean(),
            **{name: grouped[name].mean() for name in SUMMARY_METRICS[3:]},
        }
    ).reset_index()
    return summary[[*SUMMARY_METRICS, "d_new", "percentile"]]


def conditions_table(cells: Iterable[Cell], *, seed: int = 0) -> pd.DataFrame:
    """Layers x conditions x subsets: raw, no_delta, full and controls, columns `behaviour_columns`.

    Rates have Wilson intervals over prompts; means and differences from raw have bootstrap intervals over prompts
    (`seed`). For a condition in the un-finetuned model, raw is that model's own. A difference is NaN if its raw was not
    evaluated on that subset. `layer` is the label of a layer or a set of
    layers, as `sites.sites_label` writes it.
    """
    return _behaviour_table(cells, dose=False, seed=seed)


def dose_response_table(cells: Iterable[Cell], *, seed: int = 0) -> pd.DataFrame:
    """Layers x alpha x subsets: the `alpha` cells, and controls measured at every alpha; columns and intervals as in
    `conditions_table`."""
    return _behaviour_table(cells, dose=True, seed=seed)


def dose_response_statistics(cells: Iterable[Cell], *, seed: int = 0) -> pd.DataFrame:
    """Slope and Spearman rho of each metric against alpha, one row per (layer, subset, d_new, percentile, metric).

    Over the prompts present at every alpha, intervals by bootstrap over prompts. The slope is in metric units per
    unit of alpha. Groups with fewer than two alphas, and metrics undefined on a subset, have no row. A rate that no
    prompt changes at any alpha has slope 0 without an interval.
    """
    groups: dict[CellKey, list[tuple[float, PromptSums]]] = {}
    for key, sums in _with_ends(pool(cells)).items():
        if _dosed(key.condition) and key.alpha is not None:
            groups.setdefault(key._replace(alpha=None), []).append((key.alpha, sums))
    rows = []
    for key, doses in groups.items():
        replicas = max(sums.replicas for _, sums in doses)  # at alpha 0 all replicas are the same
        shared = doses[0][1].prompts
        for _, sums in doses[1:]:
            shared = np.intersect1d(shared, sums.prompts)
        if len(doses) < 2 or not len(shared):
            continue
        alphas = [alpha for alpha, _ in doses]
        taken = [sums.take(shared) for _, sums in doses]
        for column, metric in enumerate(taken[0].metrics):
            tops, bottoms = (
                np.stack([np.broadcast_to(array[..., column], (replicas, len(shared))) for array in arrays])
                for arrays in ([sums.tops for sums in taken], [sums.bottoms for sums in taken])
            )
            slope, rho = slope_and_spearman(alphas, tops, bottoms, seed=seed)
            if math.isnan(slope.value):
                continue
            if metric not in MEANS and not np.ptp(tops, axis=0).any():  # no prompt ever changed: nothing to resample
                slope = Estimate(slope.value, math.nan, math.nan)
            rows.append(
                _names(key)
                | {"metric": metric}
                | slope.columns("slope")
                | rho.columns("spearman")
                | {"n_alphas": len(doses), "n_examples": len(shared)}
            )
    names = ["slope", "slope_low", "slope_high", "spearman", "spearman_low", "spearman_high"]
    keys = ["target", "layer", "subset", "condition", "d_new", "percentile", "metric"]
    return pd.DataFrame(rows, columns=[*keys, *names, "n_alphas", "n_examples"])


def delta_contrast_table(cells: Iterable[Cell], *, seed: int = 0) -> pd.DataFrame:
    """What adding the delta changes: `full` minus `no_delta` over the same prompts, CE and every rate.

    One row per (layer, subset, d_new, percentile) that has both; difference columns as in `conditions_table`, here
    against no_delta instead of raw.
    """
    pooled = pool(cells)
    rows = []
    for key, sums in pooled.items():
        base = pooled.get(key._replace(condition="no_delta", alpha=0.0, d_new=None))
        if key.condition == "full" and base is not None:
            rows.append(_names(key) | _differences(sums, base, seed) | {"n_examples": len(sums.prompts)})
    return pd.DataFrame(rows)


def _behaviour_table(cells: Iterable[Cell], *, dose: bool, seed: int) -> pd.DataFrame:
    cells = list(cells)
    pooled = _with_ends(pool(cells))
    unedited = {(key.condition, key.subset): sums for key, sums in pooled.items() if key.condition in UNEDITED}
    rows = [
        _behaviour_row(key, sums, unedited.get((_baseline(key.condition), key.subset)), seed)
        for key, sums in pooled.items()
        if _dosed(key.condition) == dose
    ]
    return pd.DataFrame(rows, columns=behaviour_columns(rates_of(cells))).astype(KEY_TYPES)


def _with_ends(pooled: dict[CellKey, PromptSums]) -> dict[CellKey, PromptSums]:
    """Adds the ends of `scaled_weights`, which are measured as other conditions: no_delta at alpha 0, raw at 1."""
    extended = dict(pooled)
    for key in pooled:
        if key.condition == "scaled_weights":
            start = pooled.get(key._replace(condition="no_delta", alpha=0.0))
            raw = (sums for other, sums in pooled.items() if (other.condition, other.subset) == ("raw", key.subset))
            extended |= {
                key._replace(alpha=alpha): sums
                for alpha, sums in ((0.0, start), (1.0, next(raw, None)))
                if sums is not None
            }
    subsets = list(dict.fromkeys(key.subset for key in pooled))
    return {key: extended[key] for key in sorted(extended, key=lambda key: table_order(key, subsets))}


def _behaviour_row(key: CellKey, sums: PromptSums, raw: PromptSums | None, seed: int) -> dict[str, Any]:
    row: dict[str, Any] = key._asdict()
    row |= {"n_examples": len(sums.prompts), "n_tokens": round(float(sums.bottoms.mean(0)[:, 0].sum()))}
    row |= {"n_replicas": sums.replicas}
    zeros, ones = np.zeros(len(sums.prompts)), np.ones(len(sums.prompts))
    for column, metric in enumerate(sums.metrics):
        tops, bottoms = sums.tops[..., column], sums.bottoms[..., column]
        if metric in MEANS:
            row |= paired_bootstrap(tops, bottoms, zeros, ones, seed=seed).columns(metric)
        else:
            successes, judged = float(tops.mean(0).sum()), float(bottoms.mean(0).sum())
            n = math.ceil(judged)  # replicas may judge different prompts, so that their mean number is not whole
            rate = successes / judged if judged else math.nan
            row |= Estimate(rate, *wilson(successes if n == judged else rate * n, n)).columns(metric)
            row[_count_of(metric)] = n
    return row | (_differences(sums, raw, seed) if raw is not None else {})


def _differences(sums: PromptSums, baseline: PromptSums, seed: int) -> dict[str, float]:
    """`delta_ce` and `delta_<rate>` with their intervals, over the prompts that both have."""
    # Raw against itself is zero by definition, not zero as far as n prompts can tell.
    rates = paired_bootstrap if sums is baseline else rate_difference
    shared = np.intersect1d(sums.prompts, baseline.prompts)
    ours, theirs = sums.take(shared), baseline.take(shared)
    row: dict[str, float] = {}
    for column, metric in enumerate(sums.metrics):
        data = (ours.tops, ours.bottoms, theirs.tops, theirs.bottoms)
        arrays = [values[..., column] for values in data]
        if metric == "mean_ce":
            row |= paired_bootstrap(*arrays, seed=seed).columns("delta_ce")
        elif metric not in MEANS:
            row |= rates(*arrays, seed=seed).columns(f"delta_{metric}")
    return row


def _dosed(condition: str) -> bool:
    return condition in CONDITIONS and CONDITIONS[condition].dosed


def _baseline(condition: str) -> str:
    return CONDITIONS[condition].baseline if condition in CONDITIONS else "raw"


def _names(key: CellKey) -> dict[str, Any]:
    names = ("target", "layer", "subset", "d_new", "percentile", "condition")
    return {name: getattr(key, name) for name in names}

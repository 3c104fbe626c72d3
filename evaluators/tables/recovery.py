"""Gaps between the ground and the finetuned model (the ceiling), and the shares of them that are recovered.

In: finished cells. Out: tables of the parts' shares of the whole effect, of gaps, of recovered shares, of the
few-features curve, and of the part of each site's change that deltas leave unexplained. If the interval of a gap
contains zero, there is nothing to recover, and no share is given.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from data.rows import slug
from evaluators.conditions import CONDITIONS
from evaluators.tables.pooling import MEANS, Cell, CellKey, PromptSums, of_kind, pool
from evaluators.tables.statistics import Estimate, paired_bootstrap, rate_difference, recovered_share
from sites import label_of_keys, parse_sites

ENOUGH = 0.9
"""The share of the CE gap that the headline's number of features recovers."""
EVERY_LAYER = "all"
"""The name of the set of all layers in cells and tables of parts."""
PLACE = ("target", "layer", "percentile", "d_new", "subset")
GAP_COLUMNS = [
    *("target", "layer", "subset", "metric", "raw", "ground"),
    *("gap", "gap_low", "gap_high", "unfinetuned", "share", "share_low", "share_high", "n_examples"),
]
RECOVERED_COLUMNS = [
    *(*PLACE, "metric", "condition", "alpha", "value", "gap", "gap_low", "gap_high"),
    *("recovered", "recovered_low", "recovered_high", "n_examples"),
]
CURVE_COLUMNS = ["layer", "d_new", "subset", "k", "mean_ce", "kl", "recovered", "recovered_low", "recovered_high"]
PARTS_COLUMNS = ["part", "layers", "way", "subset", "mean_ce", "share", "share_low", "share_high", "n_examples"]
CHANGE_COLUMNS = ["layer", "d_new", "subset", "part", "unexplained", "unexplained_low", "unexplained_high"]


def parts_table(cells: Iterable[Cell], *, seed: int = 0) -> pd.DataFrame:
    """Each part's share of the whole effect of finetuning on CE, one row per (subset, part or third of layers, way).

    If only the part is un-finetuned, it is the share that is lost; if only the part is finetuned, the share that it
    brings. `share` is NaN if the whole effect's interval contains zero.
    """
    rows = []
    for cell in of_kind(cells, "parts"):
        before, after = (_nll(cell[model]) for model in ("unfinetuned", "finetuned"))
        is_effect = paired_bootstrap(*before, *after, seed=seed).excludes_zero
        for part in cell["parts"]:
            here = _nll(part["rows"])
            start, end = (after, before) if part["way"] == "unfinetuned" else (before, after)
            share = Estimate(math.nan, math.nan, math.nan)
            if is_effect:
                share = recovered_share(start, here, end, seed=seed)
            row = {name: part[name] for name in ("part", "layers", "way")} | {"subset": cell["subset"]}
            row |= {"mean_ce": here[0].sum() / here[1].sum()} | share.columns("share")
            rows.append(row | {"n_examples": len(part["rows"])})
    return pd.DataFrame(rows, columns=PARTS_COLUMNS)


def _nll(rows: Sequence[dict[str, Any]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Nats and tokens of each prompt."""
    nll, tokens = (np.array([row[name] for row in rows], dtype=np.float64) for name in ("nll", "n_tokens"))
    return nll, tokens


def gap_table(cells: Iterable[Cell], *, seed: int = 0) -> pd.DataFrame:
    """Ground minus raw of each metric: one row for each (target, set of layers, subset, metric).

    For the target `change`, `unfinetuned` is the metric of the model before finetuning, and `share` the gap's share of
    the whole effect (un-finetuned minus raw), given if that effect's interval excludes zero.
    """
    pooled = pool(cells)
    rows = []
    for key, ground in pooled.items():
        if key.condition != "no_delta":
            continue
        raw = _raw(pooled, key, "raw")
        before = _raw(pooled, key, "base_model_raw") if key.target == "change" else None
        if raw is None:
            continue
        for metric in _recoverable(ground):
            gap = _difference(ground, raw, metric, seed)
            if math.isnan(gap.value):
                continue
            row: dict[str, Any] = {"target": key.target, "layer": key.layer, "subset": key.subset, "metric": metric}
            row |= {"raw": _value(raw, metric), "ground": _value(ground, metric)} | gap.columns("gap")
            if before is not None and metric != "kl":
                row["unfinetuned"] = _value(before, metric)
                if _difference(before, raw, metric, seed).excludes_zero:
                    # 1 - the share of the whole effect that remains when the sites are un-finetuned.
                    left = _recovered(before, ground, raw, metric, seed)
                    row |= Estimate(1 - left.value, 1 - left.high, 1 - left.low).columns("share")
            rows.append(row | {"n_examples": len(ground.prompts)})
    return pd.DataFrame(rows, columns=GAP_COLUMNS)


def recovered_table(cells: Iterable[Cell], *, seed: int = 0) -> pd.DataFrame:
    """The share of each gap that a condition recovers: (ground - condition) / (ground - raw), over the same prompts.

    One row for each condition and strength except the ground itself. `recovered` is NaN if the gap's interval contains
    zero.
    """
    pooled = pool(cells)
    rows = []
    gaps: dict[tuple[CellKey, str], Estimate] = {}  # many conditions have the same ground
    for key, sums in pooled.items():
        ground_key = key._replace(condition="no_delta", alpha=0.0, d_new=None)
        ground = pooled.get(ground_key)
        raw = _raw(pooled, key, "raw")
        if ground is None or raw is None or key.condition == "no_delta" or key.alpha == 0.0:
            continue
        for metric in _recoverable(ground):
            if (ground_key, metric) not in gaps:
                gaps[ground_key, metric] = _difference(ground, raw, metric, seed)
            gap = gaps[ground_key, metric]
            value = _value(sums, metric)
            if math.isnan(gap.value) or math.isnan(value):
                continue
            share = Estimate(math.nan, math.nan, math.nan)
            if gap.excludes_zero:
                share = _recovered(ground, sums, raw, metric, seed)
            row: dict[str, Any] = {name: getattr(key, name) for name in PLACE}
            row |= {"metric": metric, "condition": key.condition, "alpha": key.alpha, "value": value}
            rows.append(row | gap.columns("gap") | share.columns("recovered") | {"n_examples": len(sums.prompts)})
    return pd.DataFrame(rows, columns=RECOVERED_COLUMNS)


def widths_table(cells: Sequence[Cell], *, seed: int = 0) -> pd.DataFrame:
    """What change deltas of each width, and controls of the same rank, recover in all layers at once at alpha 1;
    columns as in `recovered_table`. Empty if only one width was measured."""
    widths = of_kind(cells, "width")
    labels = {label_of_keys(cell["layers"]) for cell in widths}
    every = [cell | {"kind": "behaviour"} for cell in [*of_kind(cells, "behaviour"), *widths]]
    table = recovered_table(every, seed=seed) if widths else pd.DataFrame(columns=RECOVERED_COLUMNS)
    conditions = [name for name, condition in CONDITIONS.items() if condition.ranked or name == "full"]
    here = table["layer"].isin(labels) & (table["target"] == "change") & table["condition"].isin(conditions)
    return table[here].reset_index(drop=True)


def curve_table(cells: Sequence[Cell], *, seed: int = 0) -> pd.DataFrame:
    """Recovered CE with only the k most effective features on, one row for each (set of layers, subset, k)."""
    raw = {cell["subset"]: cell["rows"] for cell in of_kind(cells, "behaviour") if cell["condition"] == "raw"}
    rows = []
    for cell in of_kind(cells, "curve"):
        tokens = np.array([row["n_tokens"] for row in cell["counts"][0]["rows"]], dtype=np.float64)
        nll = {entry["k"]: np.array([row["nll"] for row in entry["rows"]]) for entry in cell["counts"]}
        reference = np.array([row["nll"] for row in raw[cell["subset"]]])
        gap = paired_bootstrap(nll[0], tokens, reference, tokens, seed=seed)
        for entry in cell["counts"]:
            share = Estimate(math.nan, math.nan, math.nan)
            if gap.excludes_zero:
                pairs = [(nll[0], tokens), (nll[entry["k"]], tokens), (reference, tokens)]
                share = recovered_share(*pairs, seed=seed)
            row = {"layer": label_of_keys(cell["layers"]), "d_new": cell["d_new"], "subset": cell["subset"]}
            row |= {"k": entry["k"], "mean_ce": nll[entry["k"]].sum() / tokens.sum()}
            row |= {"kl": sum(prompt["kl"] for prompt in entry["rows"]) / tokens.sum()} | share.columns("recovered")
            rows.append(row)
    return pd.DataFrame(rows, columns=CURVE_COLUMNS)


def features_needed(curve: pd.DataFrame, subset: str) -> int | None:
    """The smallest k that recovers `ENOUGH` of the CE gap; None if none does, or there is no gap."""
    enough = curve[(curve["subset"] == subset) & (curve["recovered"] >= ENOUGH)]
    return None if enough.empty else int(enough["k"].min())


def change_table(cells: Iterable[Cell], *, seed: int = 0) -> pd.DataFrame:
    """The unexplained share of a layer's change, |c - delta(x)|^2 / |c|^2, by subset and separately for tokens of
    prompts and of targets, with intervals over prompts."""
    rows = []
    for cell in of_kind(cells, "change"):
        for layer in cell["layers"]:
            entries = pd.DataFrame(layer["rows"])
            for (subset, part), of_part in entries.groupby(["subset", "part"], sort=False):
                nothing = np.zeros(len(of_part)), np.ones(len(of_part))
                left = paired_bootstrap(of_part["left"], of_part["change"], *nothing, seed=seed)
                row = {"layer": layer["layer"], "d_new": cell["d_new"], "subset": subset, "part": part}
                row |= left.columns("unexplained")
                tokens = of_part["n_tokens"].sum()
                rows.append(row | {"l0": of_part["active"].sum() / tokens, "n_tokens": tokens})
    return pd.DataFrame(rows, columns=[*CHANGE_COLUMNS, "l0", "n_tokens"])


def headlines(gaps: pd.DataFrame, recovered: pd.DataFrame, curve: pd.DataFrame) -> dict[str, float]:
    """The figures by which sweeps are compared, by name, for the change deltas in the largest set of layers.

    For each subset: the gaps in CE, KL and the rates; each gap as a share of the whole effect of finetuning
    (`mlp_share_`); the shares of the gaps that the deltas and the random control recover; and how many features recover
    `ENOUGH` of the CE gap. `mlp_share_` counts all sites of the set, not only MLPs; it keeps its name because runs
    already in MLflow have it. Recovered shares come first, because MLflow's comparison opens with the first figure."""
    figures: dict[str, float] = {}
    of_change = gaps[gaps["target"] == "change"]
    if of_change.empty:
        return figures
    widest = widest_set(of_change)
    here = recovered[(recovered["target"] == "change") & (recovered["layer"] == widest)]
    for _, row in here.iterrows():
        if row["condition"] in ("full", "random_delta"):
            name = f"recovered_{row['metric'].removeprefix('mean_')}"
            name += "" if row["condition"] == "full" else "_random"
            for end in ("", "_low", "_high"):
                figures[f"{name}_{slug(row['subset'])}{end}"] = row[f"recovered{end}"]
    for _, row in of_change[of_change["layer"] == widest].iterrows():
        name = f"{row['metric'].removeprefix('mean_')}_{slug(row['subset'])}"
        figures |= {f"gap_{name}": row["gap"], f"mlp_share_{name}": row.get("share", math.nan)}
    for subset in curve["subset"].unique():
        if (count := features_needed(curve, subset)) is not None:
            figures[f"features_for_90_percent_{slug(subset)}"] = float(count)
    return {name: float(value) for name, value in figures.items() if not pd.isna(value)}


def widest_set(table: pd.DataFrame) -> str:
    """The label of the largest set of layers in a table."""
    return max(table["layer"].unique(), key=lambda label: len(parse_sites(label)))


def _raw(pooled: dict[CellKey, PromptSums], key: CellKey, condition: str) -> PromptSums | None:
    """The sums of an unedited model on the subset of `key`."""
    matches = (sums for other, sums in pooled.items() if (other.condition, other.subset) == (condition, key.subset))
    return next(matches, None)


def _recoverable(sums: PromptSums) -> list[str]:
    """The metrics that have a recovered share: all except mean activations."""
    return [metric for metric in sums.metrics if metric not in ("mean_abs_base_acts", "mean_abs_delta_acts")]


def _pair(sums: PromptSums, metric: str) -> tuple[Any, Any]:
    column = sums.metrics.index(metric)
    return sums.tops[..., column], sums.bottoms[..., column]


def _value(sums: PromptSums, metric: str) -> float:
    top, bottom = (part.mean(0).sum() for part in _pair(sums, metric))
    return float(top / bottom) if bottom else math.nan


def _difference(sums: PromptSums, baseline: PromptSums, metric: str, seed: int) -> Estimate:
    estimator = paired_bootstrap if metric in MEANS else rate_difference
    return estimator(*_pair(sums, metric), *_pair(baseline, metric), seed=seed)


def _recovered(ground: PromptSums, sums: PromptSums, raw: PromptSums, metric: str, seed: int) -> Estimate:
    estimate = recovered_share(_pair(ground, metric), _pair(sums, metric), _pair(raw, metric), seed=seed)
    if metric in MEANS or estimate.low != estimate.high:
        return estimate
    # Every prompt says the same of the rate, as where all call: the share allows for the prompts that n of them cannot
    # exclude, as far as a rate can go.
    start, end = (_value(model, metric) for model in (ground, raw))
    model, at = min(((ground, start), (raw, end)), key=lambda pair: abs(pair[1] - _value(sums, metric)))
    apart = _difference(sums, model, metric, seed)
    possible = [(start - rate) / (start - end) for rate in (0.0, 1.0)]
    ends = [(start - at - difference) / (start - end) for difference in (apart.low, apart.high)]
    low, high = (min(max(share, min(possible)), max(possible)) for share in (min(ends), max(ends)))
    return Estimate(estimate.value, low, high)

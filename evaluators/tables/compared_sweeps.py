"""Sweeps side by side: their headline figures, the settings that differ, and means over seeds.

In: the settings of finished sweeps and their report tables, or their figures in a tracker. Out: one table of figures,
one of settings, and one pooled over the sweeps that differ only in the seed.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pandas as pd

from evaluators.tables.pooling import RATE, rates_in
from evaluators.tables.recovery import ENOUGH, features_needed, widest_set

HERE_ONLY = ("name", "storage.", "compute.")
"""Settings that say only where and how fast a sweep ran; they are not compared."""
NOT_HERE_ONLY = ("compute.precision",)
FIGURE_COLUMNS = ["sweep", "subset", "figure", "value", "low", "high"]
POOLED_COLUMNS = ["sweeps", "subset", "figure", "mean", "sd", "low", "high", "n"]
GAP, SHARE = "CE gap, nats per target token", "share of the whole effect"
RECOVERED = {
    ("full", "mean_ce"): "CE recovered, alpha 1",
    ("full", "kl"): "KL recovered, alpha 1",
    ("random_delta", "mean_ce"): "CE recovered, random directions",
}
FEATURES = f"features for {ENOUGH:.0%}"
STRENGTHS = {"no_delta": "alpha 0", "full": "alpha 1", "raw": "finetuned"}


class ReportTables(NamedTuple):
    """The tables of a sweep's report, by their names in `evaluators.tables`; curve and dose-response may be missing."""

    gaps: pd.DataFrame
    recovered: pd.DataFrame
    conditions: pd.DataFrame
    curve: pd.DataFrame | None = None
    dose: pd.DataFrame | None = None


@dataclass(frozen=True)
class ComparedSweep:
    """The parts of a sweep that are compared: settings by dotted key, `figures` as in `FIGURE_COLUMNS`, and its knob.

    All figures are for `layers`, the largest set of layers; `rate` is the first behaviour's column. `dose` has a row
    for each (subset, alpha), `finetuned` one for each subset; both are empty if unavailable.
    """

    name: str
    settings: Mapping[str, Any]
    figures: pd.DataFrame
    layers: str = ""
    rate: str | None = None
    dose: pd.DataFrame = field(default_factory=pd.DataFrame)
    finetuned: pd.DataFrame = field(default_factory=pd.DataFrame)
    where: str = ""

    @property
    def seed(self) -> Any:
        return self.settings.get("seed")


def from_tables(name: str, settings: Mapping[str, Any], tables: ReportTables, where: str = "") -> ComparedSweep:
    """A sweep from its report's tables; raises ValueError if it has no change deltas."""
    gaps = tables.gaps[tables.gaps["target"] == "change"]
    if gaps.empty:
        raise ValueError("has no change deltas")
    layers = widest_set(gaps)
    gaps = gaps[gaps["layer"] == layers]
    recovered = tables.recovered[(tables.recovered["target"] == "change") & (tables.recovered["layer"] == layers)]
    spliced = (tables.conditions["target"] == "change") & (tables.conditions["layer"] == layers)
    conditions = tables.conditions[spliced | (tables.conditions["condition"] == "raw")]
    rate = next((name for name in rates_in(conditions) if conditions[name].notna().any()), None)
    rows = []
    for subset in gaps["subset"].unique():
        here, shares, rates = (table[table["subset"] == subset] for table in (gaps, recovered, conditions))
        rows += _figures(here, shares, rates, rate)
        if tables.curve is not None and (tables.curve["subset"] == subset).any():
            count = features_needed(tables.curve, subset)
            rows.append({"subset": subset, "figure": FEATURES, "value": math.nan if count is None else count})
    dose = tables.dose if tables.dose is not None else pd.DataFrame()
    if len(dose):
        dose = dose[(dose["target"] == "change") & (dose["layer"] == layers) & (dose["condition"] == "alpha")]
    raw = conditions[conditions["condition"] == "raw"]
    return ComparedSweep(name, settings, _table(name, rows), layers, rate, dose, raw, where)


def _figures(
    gaps: pd.DataFrame, recovered: pd.DataFrame, conditions: pd.DataFrame, rate: str | None
) -> list[dict[str, Any]]:
    """The figures of one subset: the gap, how much of it is recovered, and the first behaviour's rate."""
    figures = []
    ce = gaps[gaps["metric"] == "mean_ce"]
    if len(ce):
        figures += [_figure(ce, "gap", GAP), _figure(ce, "share", SHARE)]
    for (condition, metric), name in RECOVERED.items():
        rows = recovered[(recovered["condition"] == condition) & (recovered["metric"] == metric)]
        if len(rows):
            figures.append(_figure(rows, "recovered", name))
    for condition, strength in STRENGTHS.items() if rate is not None else ():
        rows = conditions[conditions["condition"] == condition].dropna(subset=[rate])
        if len(rows):
            figures.append(_figure(rows, str(rate), rate_name(rate, strength)))
    return figures


def rate_name(rate: str | None, strength: str) -> str:
    return f"{str(rate).removesuffix(RATE)} rate, {strength}"


def _figure(rows: pd.DataFrame, column: str, name: str) -> dict[str, Any]:
    row = rows.iloc[0]
    ends = {end: row.get(f"{column}_{end}", math.nan) for end in ("low", "high")}
    return {"subset": row["subset"], "figure": name, "value": row.get(column, math.nan), **ends}


def from_metrics(
    name: str, settings: Mapping[str, Any], metrics: Mapping[str, float], where: str = ""
) -> ComparedSweep:
    """A sweep from its figures in a tracker, named by `recovery.headlines`; raises ValueError if there are none.

    A tracker has no intervals of the gap, no rates by strength and no knob, and names a subset by its slug.
    """
    prefix = "gap_ce_"
    subsets = [name.removeprefix(prefix) for name in metrics if name.startswith(prefix)]
    # The end of an interval (_low, _high) is not a subset.
    subsets = [subset for subset in subsets if not _is_end(f"{prefix}{subset}", metrics)]
    if not subsets:
        raise ValueError("has no change deltas")
    known = {"gap_ce": GAP, "mlp_share_ce": SHARE, "features_for_90_percent": FEATURES}
    for (condition, metric), figure in RECOVERED.items():
        random = "" if condition == "full" else "_random"
        known[f"recovered_{metric.removeprefix('mean_')}{random}"] = figure
    rows = [
        {"subset": subset, "figure": figure, "value": metrics[f"{key}_{subset}"]}
        | {end: metrics.get(f"{key}_{subset}_{end}", math.nan) for end in ("low", "high")}
        for subset in subsets
        for key, figure in known.items()
        if f"{key}_{subset}" in metrics
    ]
    return ComparedSweep(name, settings, _table(name, rows), where=where)


def _is_end(name: str, metrics: Mapping[str, float]) -> bool:
    return any(name.endswith(end) and name.removesuffix(end) in metrics for end in ("_low", "_high"))


def _table(name: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame([{"sweep": name, **row} for row in rows], columns=FIGURE_COLUMNS)
    return table.astype(dict.fromkeys(("value", "low", "high"), float))


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted key. Nulls count as unset and are left out, since a tracker does not store them."""
    by_key: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            by_key |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            by_key[f"{prefix}{key}"] = value
    return by_key


def _compared(key: str) -> bool:
    return key in NOT_HERE_ONLY or not any(
        key.startswith(name) if name.endswith(".") else key == name for name in HERE_ONLY
    )


def settings_that_differ(sweeps: Sequence[ComparedSweep]) -> dict[str, list[Any]]:
    """The settings that are not equal in all sweeps, with their value in each; None if unset."""
    keys = dict.fromkeys(key for sweep in sweeps for key in sweep.settings if _compared(key))
    values = {key: [sweep.settings.get(key) for sweep in sweeps] for key in keys}
    return {key: listed for key, listed in values.items() if len({_normalised(value) for value in listed}) > 1}


def _normalised(value: Any) -> str:
    """A value as text, the same for 1 and 1.0."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    return json.dumps(value, sort_keys=True, default=str)


def seed_groups(sweeps: Iterable[ComparedSweep]) -> list[list[ComparedSweep]]:
    """Groups of two or more sweeps that differ only in the seed, with the first sweep of each seed."""
    groups: dict[str, dict[Any, ComparedSweep]] = {}
    for sweep in sweeps:
        others = {key: _normalised(value) for key, value in sweep.settings.items() if _compared(key) and key != "seed"}
        groups.setdefault(json.dumps(others, sort_keys=True), {}).setdefault(sweep.seed, sweep)
    return [list(group.values()) for group in groups.values() if len(group) > 1]


def repeated(sweeps: Sequence[ComparedSweep]) -> list[tuple[str, str]]:
    """Pairs of sweeps with equal settings, including the seed: the same run, made twice."""
    first: dict[str, str] = {}
    pairs = []
    for sweep in sweeps:
        settings = {key: _normalised(value) for key, value in sweep.settings.items() if _compared(key)}
        name = first.setdefault(json.dumps(settings, sort_keys=True), sweep.name)
        if name != sweep.name:
            pairs.append((name, sweep.name))
    return pairs


def unit_of(group: Sequence[ComparedSweep]) -> str:
    """What the sweeps of a group sample: adapters, or only seeds if they use a given finetuned model."""
    return "seeds" if group[0].settings.get("model.finetuned") else "adapters"


def figures_of(sweeps: Sequence[ComparedSweep]) -> pd.DataFrame:
    """The headline figures of all sweeps in one table."""
    return pd.concat([sweep.figures for sweep in sweeps], ignore_index=True)


def pooled(group: Sequence[ComparedSweep]) -> pd.DataFrame:
    """Mean, standard deviation (n - 1) and range of each figure over a group's sweeps, and how many sweeps have it."""
    rows = []
    for (subset, figure), of_figure in figures_of(group).groupby(["subset", "figure"], sort=False):
        values = of_figure["value"].dropna()
        spread = {"mean": values.mean(), "sd": values.std(), "low": values.min(), "high": values.max()}
        names = ", ".join(sweep.name for sweep in group)
        rows.append({"sweeps": names, "subset": subset, "figure": figure, **spread, "n": len(values)})
    return pd.DataFrame(rows, columns=POOLED_COLUMNS)

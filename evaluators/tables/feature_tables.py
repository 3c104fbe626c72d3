"""Feature cells become a table, ordered by causal effect.

In: cells of kind `features`, one a layer. Out: one row a feature: firing rates, what its ablation changes with paired
bootstrap intervals over prompts, its estimated effect, tokens and contexts.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from evaluators.tables.pooling import RATE, Cell, of_kind
from evaluators.tables.statistics import Estimate, paired_bootstrap, rate_difference


def features_table(cells: Iterable[Cell], *, seed: int = 0) -> pd.DataFrame:
    """One row a feature, those whose ablation changes CE most first (on the subset where it changes it most), then
    those that were not ablated by |attribution|.

    `delta_ce_SUBSET` and `delta_RATE_SUBSET` are `full` without the feature minus `full`, with their ends.
    """
    rows = []
    for cell in of_kind(cells, "features"):
        for one in cell["features"]:
            row: dict[str, Any] = {name: cell[name] for name in ("layer", "percentile", "d_new")}
            row |= {"feature": one["feature"], "effect": math.nan, "attribution": one["attribution"]}
            row |= {f"firing_rate_{subset}": rate for subset, rate in one["firing_rate"].items()}
            effects = {subset: _effects(entries, seed) for subset, entries in (one["ablation"] or {}).items()}
            for subset, of_subset in effects.items():
                for name, effect in of_subset.items():
                    row |= _columns(f"delta_{name}_{subset}", effect)
            if effects:
                row["effect"] = max((of_subset["ce"].value for of_subset in effects.values()), key=abs)
            row |= {name: " ".join(map(repr, one[name])) for name in ("promoted", "suppressed")}
            row["contexts"] = " | ".join(
                f"{context['text']!r} ({context['subset']}, {context['activation']:.3g})" for context in one["contexts"]
            )
            rows.append(row)
    rows.sort(key=_order)
    return pd.DataFrame(rows)


def _order(row: dict[str, Any]) -> tuple[bool, float, float, int]:
    unmeasured = math.isnan(row["effect"])
    return unmeasured, 0.0 if unmeasured else -abs(row["effect"]), -abs(row["attribution"]), row["layer"]


def _effects(entries: Sequence[dict[str, Any]], seed: int) -> dict[str, Estimate]:
    """Ablated minus full over the same prompts: cross-entropy, and each rate that is defined there."""
    tokens = [one["n_tokens"] for one in entries]
    ce = paired_bootstrap(
        [one["nll"] for one in entries], tokens, [one["nll_full"] for one in entries], tokens, seed=seed
    )
    found = {"ce": ce}
    for name in entries[0]["behaviours"]:
        pairs = [(one["behaviours"][name], one["behaviours_full"][name]) for one in entries]
        known = [(float(one), float(full)) for one, full in pairs if one is not None and full is not None]
        if known:
            without, full = zip(*known, strict=True)
            found[f"{name}{RATE}"] = rate_difference(without, [1.0] * len(known), full, [1.0] * len(known), seed=seed)
    return found


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}

"""Feature cells become a table, ordered by causal effect.

In: cells of kind `features`, one a layer. Out: one row a feature: firing rates, what its ablation changes with paired
bootstrap intervals over prompts, its estimated effect, tokens and contexts.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from evaluators.tables.pooling import Cell, of_kind
from evaluators.tables.statistics import Estimate, paired_bootstrap, rate_difference


def features_table(cells: Iterable[Cell], *, seed: int = 0) -> pd.DataFrame:
    """One row a feature, those whose ablation changes CE most first (on the subset where it changes it most), then
    those that were not ablated by |attribution|.

    `delta_ce_SUBSET` and `delta_tool_call_rate_SUBSET` are `full` without the feature minus `full`, with their ends.
    """
    rows = []
    for cell in of_kind(cells, "features"):
        for one in cell["features"]:
            row: dict[str, Any] = {name: cell[name] for name in ("layer", "percentile", "d_new")}
            row |= {"feature": one["feature"], "effect": math.nan, "attribution": one["attribution"]}
            row |= {f"firing_rate_{subset}": rate for subset, rate in one["firing_rate"].items()}
            effects = {subset: _effects(entries, seed) for subset, entries in (one["ablation"] or {}).items()}
            for subset, (ce, calls) in effects.items():
                row |= _columns(f"delta_ce_{subset}", ce) | _columns(f"delta_tool_call_rate_{subset}", calls)
            if effects:
                row["effect"] = max((ce.value for ce, _ in effects.values()), key=abs)
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


def _effects(entries: Sequence[dict[str, Any]], seed: int) -> tuple[Estimate, Estimate]:
    """Ablated minus full over the same prompts: cross-entropy, and tool_call_rate."""
    tokens, ones = [one["n_tokens"] for one in entries], [1.0] * len(entries)
    ce = paired_bootstrap(
        [one["nll"] for one in entries], tokens, [one["nll_full"] for one in entries], tokens, seed=seed
    )
    called, called_full = ([float(one[name]) for one in entries] for name in ("tool_call", "tool_call_full"))
    return ce, rate_difference(called, ones, called_full, ones, seed=seed)


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}

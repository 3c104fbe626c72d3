"""Feature cells become a table and a section of the report, ordered by causal effect.

In: cells of kind `features`, one a layer. Out: one row a feature: firing rates, what its ablation changes with paired
bootstrap intervals over prompts, its estimated effect, tokens and contexts.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from evaluators.page import Section, Table, table_block
from evaluators.pooling import Cell, of_kind, subset_order
from evaluators.statistics import Estimate, paired_bootstrap, rate_difference

SHOWN = 40
"""Features on the page; the others are in features.csv."""


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


def features_section(table: pd.DataFrame) -> Section | None:
    """What single features do, the strongest first."""
    if table.empty:
        return None
    subsets = sorted((name[12:] for name in table if name.startswith("firing_rate_")), key=subset_order)
    columns = {"layer": "layer", "feature": "feature"}
    columns |= {f"firing_rate_{subset}": f"fires on {subset}" for subset in subsets}
    columns |= {f"delta_ce_{subset}": f"CE, ablated - full, {subset}" for subset in subsets}
    columns |= {f"delta_tool_call_rate_{subset}": f"tool_call_rate, ablated - full, {subset}" for subset in subsets}
    columns |= {"attribution": "estimate"}
    measured = table[table["effect"].notna()]
    help = (
        f"{len(measured)} of {len(table)} features were ablated alone under full, those of the largest estimate; "
        "differences with paired 95% intervals over prompts, strongest first. The estimate is activation times "
        "gradient, nats a target token over all subsets; firing is the share of tokens."
    )
    effects = table_block(table.head(SHOWN), columns, "Effect of single features", help)
    read = table[table["contexts"] != ""].head(SHOWN)
    meanings = Table(
        "What they read and write",
        "Tokens that the decoder direction promotes and suppresses through the unembedding, and the strongest contexts "
        "with the firing token in guillemets.",
        ["layer", "feature", "promotes", "suppresses", "strongest contexts"],
        [
            [str(row["layer"]), str(row["feature"]), row["promoted"], row["suppressed"], row["contexts"]]
            for _, row in read.iterrows()
        ],
        wide_text=True,
        folded=True,
    )
    intro = "Each delta feature on its own: where it fires, which tokens it moves, and what is missing without it."
    return Section("features", "Features", intro, [effects, meanings])


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

"""Ranking and card cells become tables of features, the most effective first.

In: cells of kind `ranking`, one a set of sites, and `cards`, a few features each. Out: every feature with its estimated
effect and firing rates; and for each card what changes without the feature, and what it does alone, with paired
bootstrap intervals over prompts.
"""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from evaluators.tables.pooling import RATE, TARGETS, Cell, of_kind
from evaluators.tables.statistics import Estimate, paired_bootstrap, rate_difference
from sites import Site

FIRING = "firing_rate_"
"""What the name of a column begins with that holds how often a feature fires on a subset."""
RANKING_COLUMNS = ["target", "rank", "layer", "feature", "effect", "d_new", "at_bos"]
WAYS = ("ablated", "alone")
"""All deltas without the feature against all of them; the feature alone on the ground against the bare ground."""


def ranking_table(cells: Sequence[Cell]) -> pd.DataFrame:
    """Every feature, those of a target ranked by estimated effect; of change deltas in the order in which the curve
    adds them, the last of each layer, number d_new, being the one at BOS."""
    rows: list[dict[str, Any]] = []
    for cell in of_kind(cells, "ranking"):
        target = cell.get("target", "change")
        for one in cell["features"]:
            row = {"target": target, "layer": one["layer"], "feature": one["feature"], "effect": one["effect"]}
            row |= {"d_new": cell["d_new"], "at_bos": target == "change" and one["feature"] == cell["d_new"]}
            rows.append(row | {f"{FIRING}{subset}": rate for subset, rate in one.get("firing_rate", {}).items()})
    rows.sort(key=lambda row: (TARGETS.index(row["target"]), -row["effect"], Site.parse(row["layer"]), row["feature"]))
    ranks: dict[str, int] = {}
    for row in rows:
        row["rank"] = ranks[row["target"]] = ranks.get(row["target"], 0) + 1
    found = dict.fromkeys(name for row in rows for name in row if name.startswith(FIRING))
    # In the order of the other tables, where these are there: JSON has sorted them.
    known = dict.fromkeys(f"{FIRING}{cell['subset']}" for cell in of_kind(cells, "behaviour") if "subset" in cell)
    columns = [
        *RANKING_COLUMNS,
        *(name for name in known if name in found),
        *(name for name in found if name not in known),
    ]
    return pd.DataFrame(rows, columns=columns)


def features_table(cells: Sequence[Cell], *, seed: int = 0) -> pd.DataFrame:
    """One row a card, in the order of the ranking, with its columns and `WAY_ce_SUBSET`, `WAY_RATE_SUBSET` with their
    ends: `ablated` is all deltas without the feature minus all of them, `alone` the feature alone minus none."""
    cards = [
        {"target": cell["target"], **one, "percentile": cell["percentile"]}
        for cell in of_kind(cells, "cards")
        for one in cell["cards"]
    ]
    if not cards:
        return pd.DataFrame()
    ranking = ranking_table(cells).set_index(["target", "layer", "feature"])
    rows = []
    for one in cards:
        key = (one["target"], one["layer"], one["feature"])
        row: dict[str, Any] = dict(zip(ranking.index.names, key, strict=True)) | ranking.loc[key].to_dict()
        row["percentile"] = one["percentile"]
        for way in WAYS:
            for subset in dict.fromkeys(entry["subset"] for entry in one[way]):
                entries = [entry for entry in one[way] if entry["subset"] == subset]
                row[f"n_{subset}"] = len(entries)
                for name, effect in _effects(entries, seed).items():
                    row |= _columns(f"{way}_{name}_{subset}", effect)
        row |= {name: " ".join(map(repr, one[name])) for name in ("promoted", "suppressed")}
        row["contexts"] = " | ".join(_context(context) for context in one["contexts"])
        rows.append(row)
    rows.sort(key=lambda row: (TARGETS.index(row["target"]), row["rank"]))
    return pd.DataFrame(rows)


def _context(context: dict[str, Any]) -> str:
    """As one line of text, the firing token in guillemets."""
    tokens, peak = context["tokens"], context["peak"]
    before, after = "".join(tokens[:peak]), "".join(tokens[peak + 1 :])
    return f"{f'{before}«{tokens[peak]}»{after}'!r} ({context['subset']}, {context['acts'][peak]:.3g})"


def _effects(entries: Sequence[dict[str, Any]], seed: int) -> dict[str, Estimate]:
    """With the way minus without, over the same prompts: cross-entropy, and each rate that is defined there."""
    tokens = [one["n_tokens"] for one in entries]
    nlls, wholes = ([one[name] for one in entries] for name in ("nll", "nll_whole"))
    found = {"ce": paired_bootstrap(nlls, tokens, wholes, tokens, seed=seed)}
    if nlls == wholes:  # nothing to resample: the feature never fires there
        found["ce"] = Estimate(0.0, math.nan, math.nan)
    for name in entries[0]["behaviours"]:
        pairs = [(one["behaviours"][name], one["behaviours_whole"][name]) for one in entries]
        known = [(float(one), float(whole)) for one, whole in pairs if one is not None and whole is not None]
        if known:
            ours, whole = zip(*known, strict=True)
            found[f"{name}{RATE}"] = rate_difference(ours, [1.0] * len(known), whole, [1.0] * len(known), seed=seed)
    return found


def _columns(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}

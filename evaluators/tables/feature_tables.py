"""Ranking and card cells become tables of features, the most effective first.

In: cells of kind `ranking`, one per set of sites, and `cards`, a few features each. Out: every feature with its
estimated effect and firing rates; and for each card what changes without the feature, and what it does alone, with
paired bootstrap intervals over prompts.
"""

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from evaluators.tables.pooling import RATE, TARGETS, Cell, of_kind
from evaluators.tables.statistics import Estimate, paired_bootstrap, rate_difference
from sites import Site

FIRING = "firing_rate_"
"""Prefix of the columns that hold how often a feature fires on a subset."""
RANKING_COLUMNS = ["target", "rank", "layer", "feature", "effect", "d_new", "at_bos", "group"]
WAYS = ("ablated", "alone")
"""All deltas except the feature, compared with all of them; the feature alone on the ground, compared with the bare
ground."""


def ranking_table(cells: Sequence[Cell]) -> pd.DataFrame:
    """Every feature, ranked by estimated effect within its target. For change deltas this is the order in which the
    curve adds them; the last feature of each layer, number d_new, is the one at BOS. `group` is the number of a
    feature's group, if it has one."""
    rows: list[dict[str, Any]] = []
    groups = groups_of(cells)
    for cell in of_kind(cells, "ranking"):
        target = cell.get("target", "change")
        for feature in cell["features"]:
            row = {"target": target} | {name: feature[name] for name in ("layer", "feature", "effect")}
            row |= {"d_new": cell["d_new"], "at_bos": target == "change" and feature["feature"] == cell["d_new"]}
            row["group"] = groups.get((target, str(feature["layer"]), feature["feature"]), pd.NA)
            rows.append(row | {f"{FIRING}{subset}": rate for subset, rate in feature.get("firing_rate", {}).items()})
    rows.sort(key=lambda row: (TARGETS.index(row["target"]), -row["effect"], Site.parse(row["layer"]), row["feature"]))
    ranks: dict[str, int] = {}
    for row in rows:
        row["rank"] = ranks[row["target"]] = ranks.get(row["target"], 0) + 1
    firing = dict.fromkeys(name for row in rows for name in row if name.startswith(FIRING))
    # JSON has sorted the subsets; put them in the order of the other tables, if there are any.
    known = dict.fromkeys(f"{FIRING}{cell['subset']}" for cell in of_kind(cells, "behaviour") if "subset" in cell)
    columns = [
        *RANKING_COLUMNS,
        *(name for name in known if name in firing),
        *(name for name in firing if name not in known),
    ]
    return pd.DataFrame(rows, columns=columns).astype({"group": "Int64"})


def groups_of(cells: Sequence[Cell]) -> dict[tuple[str, str, int], int]:
    """The number of each feature's group, by target, layer and feature; features without a group are missing."""
    return {
        (cell["target"], str(layer), feature): group["number"]
        for cell in of_kind(cells, "grouping")
        for group in cell["groups"]
        for layer, feature in group["features"]
    }


def features_table(cells: Sequence[Cell], *, seed: int = 0) -> pd.DataFrame:
    """One row per card, in the order and with the columns of the ranking, plus `WAY_ce_SUBSET` and `WAY_RATE_SUBSET`
    with their intervals. WAY is `ablated`, all deltas except the feature minus all of them, or `alone`, the feature
    alone minus no feature."""
    cards = [
        {"target": cell["target"], **card, "percentile": cell["percentile"]}
        for cell in of_kind(cells, "cards")
        for card in cell["cards"]
    ]
    if not cards:
        return pd.DataFrame()
    ranking = ranking_table(cells).set_index(["target", "layer", "feature"])
    rows = []
    for card in cards:
        key = (card["target"], card["layer"], card["feature"])
        row: dict[str, Any] = dict(zip(ranking.index.names, key, strict=True)) | ranking.loc[key].to_dict()
        row["percentile"] = card["percentile"]
        for way in WAYS:
            for subset in dict.fromkeys(entry["subset"] for entry in card[way]):
                entries = [entry for entry in card[way] if entry["subset"] == subset]
                row[f"n_{subset}"] = len(entries)
                for name, effect in _effects(entries, seed).items():
                    row |= effect.columns(f"{way}_{name}_{subset}")
        row |= {name: " ".join(map(repr, card[name])) for name in ("promoted", "suppressed")}
        row["contexts"] = " | ".join(_context(context) for context in card["contexts"])
        rows.append(row)
    rows.sort(key=lambda row: (TARGETS.index(row["target"]), row["rank"]))
    return pd.DataFrame(rows)


def _context(context: dict[str, Any]) -> str:
    """A context as one line of text, with the firing token in guillemets."""
    tokens, peak = context["tokens"], context["peak"]
    before, after = "".join(tokens[:peak]), "".join(tokens[peak + 1 :])
    return f"{f'{before}«{tokens[peak]}»{after}'!r} ({context['subset']}, {context['acts'][peak]:.3g})"


def _effects(entries: Sequence[dict[str, Any]], seed: int) -> dict[str, Estimate]:
    """Differences from the way's reference condition over the same prompts: cross-entropy, and each defined rate."""
    tokens = [entry["n_tokens"] for entry in entries]
    nlls, wholes = ([entry[name] for entry in entries] for name in ("nll", "nll_whole"))
    effects = {"ce": paired_bootstrap(nlls, tokens, wholes, tokens, seed=seed)}
    if nlls == wholes:  # nothing to resample: the feature never fires there
        effects["ce"] = Estimate(0.0, math.nan, math.nan)
    for name in entries[0]["behaviours"]:
        pairs = [(entry["behaviours"][name], entry["behaviours_whole"][name]) for entry in entries]
        known = [
            (float(outcome), float(whole)) for outcome, whole in pairs if outcome is not None and whole is not None
        ]
        if known:
            ours, whole = zip(*known, strict=True)
            effects[f"{name}{RATE}"] = rate_difference(ours, [1.0] * len(known), whole, [1.0] * len(known), seed=seed)
    return effects

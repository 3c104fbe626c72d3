"""Grouping and group cells become tables: the groups, what each does, and what the first few recover.

In: cells of kind `grouping`, one per set of sites, and `groups`, one per subset; the raw model's cells. Out: one row
for each group; differences in CE, KL and behaviours, of groups and of as many random features; and the share of the CE
gap that the first k groups recover. Intervals are paired bootstraps over prompts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from evaluators.tables.pooling import RATE, Cell, of_kind
from evaluators.tables.recovery import ENOUGH
from evaluators.tables.statistics import Estimate, paired_bootstrap, rate_difference, recovered_share
from sites import KINDS, Site

KIND_COLUMNS = tuple(f"n_{name}" for name in KINDS)
GROUP_COLUMNS = ["group", "n_features", *KIND_COLUMNS, "n_layers", "layers", "effect", "fires_on", "promoted"]
EFFECT_COLUMNS = ["group", "way", "random", "n_features", "subset", "metric", "value", "value_low", "value_high", "n"]
CURVE_COLUMNS = ["subset", "random", "groups", "n_features", "mean_ce", "kl", "recovered"]
CURVE_COLUMNS += ["recovered_low", "recovered_high", "n"]
COMPARED_WITH = {"without": ("without", 0), "alone": ("first", 0)}
"""For each way to measure a group, what it is compared with: all deltas, or the features at BOS alone."""
METRICS = {"ce": "nll", "kl": "kl"}


def groups_table(cells: Sequence[Cell]) -> pd.DataFrame:
    """One row per group, the largest estimated effect (nats per target token) first."""
    rows = []
    for cell in of_kind(cells, "grouping"):
        for group in cell["groups"]:
            sites = [Site.parse(key) for key, _ in group["features"]]
            kinds, layers = Counter(site.kind.name for site in sites), sorted({site.layer for site in sites})
            rows.append(
                {
                    "group": group["number"],
                    "n_features": len(sites),
                    **{f"n_{name}": kinds[name] for name in KINDS},
                    "n_layers": len(layers),
                    "layers": f"{layers[0]}-{layers[-1]}",
                    "effect": group["effect"],
                    "fires_on": " ".join(repr(token) for token, _ in group["fires_on"]),
                    "promoted": " ".join(map(repr, group["promoted"])),
                }
            )
    return pd.DataFrame(rows, columns=GROUP_COLUMNS)


def group_effects_table(cells: Sequence[Cell], *, seed: int = 0) -> pd.DataFrame:
    """What changes without a group (`without`, compared with all deltas) and with it alone (`alone`, compared with the
    features at BOS), in CE, KL and rates; `random`: with as many random features in its place."""
    rows: list[dict[str, Any]] = []
    for cell in of_kind(cells, "groups"):
        entries = {(entry["way"], entry["group"], entry["random"]): entry for entry in cell["entries"]}
        for (way, number, random), entry in entries.items():
            if way not in COMPARED_WITH or not number:
                continue
            whole = entries[(*COMPARED_WITH[way], False)]
            for metric, effect in _differences(entry["rows"], whole["rows"], seed).items():
                row = {"group": number, "way": way, "random": random, "n_features": entry["n_features"]}
                row |= {"subset": cell["subset"], "metric": metric, "n": len(entry["rows"])}
                rows.append(row | effect.columns("value"))
    table = pd.DataFrame(rows, columns=EFFECT_COLUMNS)
    return table.sort_values(["group", "way", "random"], ascending=[True, True, True], kind="stable", ignore_index=True)


def group_curve_table(cells: Sequence[Cell], *, seed: int = 0) -> pd.DataFrame:
    """Recovered CE with only the first groups on (and the features at BOS), in order of effect, and with as many random
    features (`random`). The gap is that between no features and the finetuned model on the same prompts."""
    raw = {cell["subset"]: cell["rows"] for cell in of_kind(cells, "behaviour") if cell["condition"] == "raw"}
    rows = []
    for cell in of_kind(cells, "groups"):
        entries = [entry for entry in cell["entries"] if entry["way"] == "first"]
        (nothing,) = (entry["rows"] for entry in cell["entries"] if entry["way"] == "nothing")
        tokens = np.array([row["n_tokens"] for row in nothing], dtype=np.float64)
        ground = np.array([row["nll"] for row in nothing])
        reference = np.array([raw[cell["subset"]][row["index"]]["nll"] for row in nothing])
        gap = paired_bootstrap(ground, tokens, reference, tokens, seed=seed)
        for entry in entries:
            nll = np.array([row["nll"] for row in entry["rows"]])
            share = Estimate(math.nan, math.nan, math.nan)
            if gap.excludes_zero:
                share = recovered_share((ground, tokens), (nll, tokens), (reference, tokens), seed=seed)
            row = {"subset": cell["subset"], "random": entry["random"], "groups": entry["group"]}
            row |= {"n_features": entry["n_features"], "mean_ce": nll.sum() / tokens.sum(), "n": len(nll)}
            row |= {"kl": sum(prompt["kl"] for prompt in entry["rows"]) / tokens.sum()} | share.columns("recovered")
            rows.append(row)
    return pd.DataFrame(rows, columns=CURVE_COLUMNS)


def groups_needed(curve: pd.DataFrame, subset: str) -> int | None:
    """The smallest measured number of groups that recovers `ENOUGH` of the CE gap; None if none does, or there is no
    gap."""
    rows = curve[(curve["subset"] == subset) & ~curve["random"].astype(bool) & (curve["recovered"] >= ENOUGH)]
    return None if rows.empty else int(rows["groups"].min())


def _differences(ours: Sequence[Any], whole: Sequence[Any], seed: int) -> dict[str, Estimate]:
    tokens = [row["n_tokens"] for row in ours]
    found = {}
    for metric, name in METRICS.items():
        found[metric] = paired_bootstrap(
            [row[name] for row in ours], tokens, [row[name] for row in whole], tokens, seed=seed
        )
    for name in ours[0].get("behaviours", {}):
        pairs = [(row["behaviours"][name], other["behaviours"][name]) for row, other in zip(ours, whole, strict=True)]
        known = [(float(a), float(b)) for a, b in pairs if a is not None and b is not None]
        if known:
            a, b = zip(*known, strict=True)
            found[f"{name}{RATE}"] = rate_difference(a, [1.0] * len(known), b, [1.0] * len(known), seed=seed)
    return found

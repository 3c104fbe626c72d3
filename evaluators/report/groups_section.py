"""The section of the report on groups: features that fire on the same tokens, and what they do together.

In: the tables of groups, and the cell that holds their contexts. Out: a section of the page: sentences, a table that
fits one screen, a picture of what the first groups recover, and the contexts of the groups in that table.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from evaluators.report.feature_page import QUOTED
from evaluators.report.figures import MUTED, band, finish, panels, plain
from evaluators.report.findings import Findings, with_interval
from evaluators.report.page import Block, Section, Sentences, Span, Table, Texts, picture, table_block
from evaluators.tables.group_tables import KIND_COLUMNS, groups_needed
from evaluators.tables.pooling import Cell, of_kind
from evaluators.tables.recovery import ENOUGH
from evaluators.tables.tables import Results

SUBSETS_SHOWN, CONTEXTS_SHOWN, TOKENS_SHOWN = 2, 2, 5
WAY_WORDS = {"alone": "alone", "without": "without it"}


def groups_section(results: Results, cells: Sequence[Cell], *, seed: int) -> Section | None:
    """None if no groups were looked for."""
    grouping = next(iter(of_kind(cells, "grouping")), None)
    if grouping is None:
        return None
    intro = (
        "Features of all layers and kinds that fire on the same tokens, clustered by the cosine similarity of their "
        "activations on held-out rows. A group's effect counts only if it exceeds that of as many random features."
    )
    blocks: list[Block] = [Sentences(_findings(results, grouping))]
    if len(results.group_effects):
        blocks.append(_table(results))
    if grouping["groups"] and results.group_curve["recovered"].notna().any():
        help = (
            "With only the first groups on, in order of their estimated effect, and the features at BOS. The control "
            "is as many random features, drawn once from all that fire."
        )
        blocks.append(picture("groups", recovered_by_groups(results.group_curve, seed=seed), "How few groups", help))
    if grouping["groups"]:
        blocks.append(_contexts(grouping, results))
    if len(results.group_effects):
        columns = {"group": "group", "way": "way", "random": "random", "n_features": "features", "subset": "subset"}
        help = "Differences from all deltas (without) and from the features at BOS (alone), with 95% intervals."
        blocks.append(table_block(results.group_effects, columns | {"metric": "metric", "value": "value"}, "All", help))
    if len(results.groups):
        columns = {"group": "group", "n_features": "features", **{name: name[2:] for name in KIND_COLUMNS}}
        columns |= {"layers": "layers", "effect": "estimated effect", "fires_on": "fires on", "promoted": "promotes"}
        help = "The estimated effect is in nats per target token, on held-out rows: integrated gradients, summed."
        blocks.append(table_block(results.groups, columns, "Every group", help))
    return Section("groups", "What features do together", intro, blocks)


def recovered_by_groups(curve: pd.DataFrame, *, seed: int) -> Figure:
    """The share of the CE gap that the first groups recover, and as many random features."""
    subsets = list(curve["subset"].unique())
    figure, grid = panels(len(subsets), columns=len(subsets), height=2.7)
    for axes, subset in zip(grid, subsets, strict=True):
        for index, (random, label) in enumerate(((False, "groups"), (True, "random features"))):
            rows = curve[(curve["subset"] == subset) & (curve["random"] == random)].dropna(subset=["recovered"])
            if len(rows):
                rows = rows.sort_values("groups").rename(columns={"groups": "alpha"})
                band(axes, rows, "recovered", label=label, number=index)
        axes.axhline(1, color=MUTED, linewidth=1)
        axes.axhline(ENOUGH, color=MUTED, linestyle="--", linewidth=1)
        axes.set(title=plain(subset), xlabel="groups on")
    low = float(curve["recovered_low"].clip(lower=-1).min())
    for axes in grid:
        axes.set_ylim(min(-0.05, low), 1.1)
    grid[0].set_ylabel("share of the CE gap recovered")
    note = f"bands: paired bootstrap 95% over prompts, seed {seed}; dashed: {ENOUGH:.0%}; grouped on held-out rows"
    return finish(figure, grid[0], note)


def _findings(results: Results, grouping: Cell) -> list[Findings]:
    groups, mean = grouping["groups"], grouping["silhouette"]
    if not groups:
        text = (
            f"None: {grouping['n_live']:,} features fire on the held-out rows, but no two clusters of eight or more "
            "stand apart."
        )
        return [Findings("Are there groups?", [text])]
    grouped = sum(len(group["features"]) for group in groups)
    sentences = [
        f"{len(groups)} groups of {grouped:,} features; {len(grouping['singles']):,} more fire, and belong to none.",
        f"Silhouette {mean['chosen']:.2f} on the half of the rows that chose the cut (similarity {grouping['cut']:g}), "
        f"{mean['held_out']:.2f} on the other half, {mean['permuted']:.2f} there with features exchanged at random.",
    ]
    curve, lines = results.group_curve, []
    for subset in curve["subset"].unique():
        rows = curve[curve["subset"] == subset]
        if rows["recovered"].isna().all():
            lines.append(f"{subset}: no gap in CE on these prompts, so nothing to recover.")
            continue
        count = groups_needed(curve, subset)
        at = count if count is not None else int(rows["groups"].max())
        row, random = (_at(rows, at, is_random) for is_random in (False, True))
        size = f"{at} group{'s' if at != 1 else ''} ({int(row['n_features']):,} features)"
        control = "" if random is None else f"; as many random features {with_interval(random, 'recovered')}"
        start = "" if count is not None else f"{ENOUGH:.0%} is not reached; "
        lines.append(f"{subset}: {start}{size} bring back {with_interval(row, 'recovered')} of the gap in CE{control}.")
    limits = []
    if len(curve):
        limits = [
            f"Measured on {int(curve['n'].max())} prompts a subset, of one finetuned model; the random features were "
            "drawn once. What few groups recover says that they are enough, not that others could not do the same."
        ]
    findings = [
        Findings("Are there groups?", sentences),
        Findings("With how few groups?", lines),
        Findings("What does this rest on?", limits),
    ]
    return [finding for finding in findings if finding.sentences]


def _at(rows: pd.DataFrame, count: int, random: bool) -> Any:
    chosen = rows[(rows["groups"] == count) & (rows["random"] == random)]
    return None if chosen.empty else chosen.iloc[0]


def _table(results: Results) -> Table:
    """The measured groups, one row each: what they fire on, promote and do, next to as many random features."""
    effects = results.group_effects[results.group_effects["metric"] == "ce"]
    measured, subsets = effects["group"].unique(), list(effects["subset"].unique())[:SUBSETS_SHOWN]
    header = ["group", "features", "qkv / o / mlp", "fires on", "promotes"]
    header += [f"CE {label}, {subset}" for subset in subsets for label in WAY_WORDS.values()]
    rows: list[list[Any]] = []
    for _, group in results.groups[results.groups["group"].isin(measured)].iterrows():
        tokens = [" ".join(QUOTED.findall(group[name])[:TOKENS_SHOWN]) for name in ("fires_on", "promoted")]
        kinds = " / ".join(str(group[name]) for name in KIND_COLUMNS)
        group_rows = effects[effects["group"] == group["group"]]
        cells = [_change(group_rows, way, subset) for subset in subsets for way in WAY_WORDS]
        rows.append([str(group["group"]), f"{group['n_features']:,}", kinds, *tokens, *cells])
    help = (
        "In order of estimated effect. Alone: only this group and the features at BOS, minus those at BOS; below 0 it "
        "helps. Without it: all deltas but this group, minus all deltas; above 0 it is missed. In nats per target "
        "token, with paired 95% intervals; in parentheses the same for as many random features, which do much too. "
        "What a group promotes is by what its features at attention's output and MLPs write to the residual stream."
    )
    return Table("The groups with the largest effects", help, header, rows, wide_text=True)


def _change(rows: pd.DataFrame, way: str, subset: str) -> str:
    way_rows = rows[(rows["way"] == way) & (rows["subset"] == subset)]
    measured, random = (way_rows[way_rows["random"] == is_random] for is_random in (False, True))
    if measured.empty:
        return "-"
    value, low, high = (float(measured.iloc[0][name]) for name in ("value", "value_low", "value_high"))
    text = f"{value:+.3f}" if math.isnan(low) else f"{value:+.3f} [{low:+.3f}, {high:+.3f}]"
    return text if random.empty else f"{text} ({float(random.iloc[0]['value']):+.3f})"


def _contexts(grouping: Cell, results: Results) -> Texts:
    shown = set(results.group_effects["group"]) or {group["number"] for group in grouping["groups"]}
    rows = []
    for group in grouping["groups"]:
        for context in group["contexts"][:CONTEXTS_SHOWN] if group["number"] in shown else ():
            spans = [
                Span(token, round(max(0.0, min(1.0, act)), 2) if not math.isnan(act) else 0.0, f"{act:.2f}")
                for token, act in zip(context["tokens"], context["acts"], strict=True)
            ]
            rows.append([[Span(f"group {group['number']}")], [Span(context["subset"])], spans])
    help = "Where each group fires most, on held-out rows; the darker a token, the more of the group fires on it."
    return Texts("What the groups fire on", help, ["group", "subset", "text"], rows)

"""Several sweeps on one page: their knobs in one picture, figures side by side, means over seeds, what differs.

In: `ComparedSweep`s. Out: the page as text, its tables (which the terminal shows too), and plain rows for CSV and JSON.
"""

import json
import math
from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluators.report.figures import INCHES_PER_PANEL, band, finish, look, panels, plain
from evaluators.report.findings import number, with_interval
from evaluators.report.page import Block, Section, Table, picture, render
from evaluators.tables import compared_sweeps
from evaluators.tables.compared_sweeps import FEATURES, GAP, SHARE, ComparedSweep
from evaluators.tables.pooling import RATE

CE = "CE (nats per target token)"
READING = (
    "Each figure is of the change deltas in a sweep's largest set of sites: un-finetuned weights take the place of the "
    "finetuned ones there, and the deltas add back what finetuning changed. Intervals are 95%, over the prompts of one "
    "sweep, with its deltas as they are."
)
LONGEST_VALUE = 60
"""Characters of a setting's value that a table shows."""


def page(sweeps: Sequence[ComparedSweep], notes: Sequence[str] = ()) -> str:
    """The comparison as one self-contained HTML page."""
    blocks: list[Block] = []
    if any(len(sweep.dose) for sweep in sweeps):
        help = "Cross-entropy and the first behaviour's rate against the deltas' strength; dotted: the finetuned model."
        blocks.append(picture("knobs", knobs(sweeps), "The knobs", help))
    tables = side_by_side(sweeps)
    sections = [
        Section("sweeps", "Side by side", " ".join([READING, *notes]), [*blocks, *tables]),
    ]
    if pooled := pooled_tables(sweeps):
        sections.append(Section("pooled", "Pooled over seeds", spread_note(sweeps), pooled))
    intro = "The settings are those that each sweep stored, resolved."
    sections.append(Section("settings", "Which sweeps, and what differs", intro, [overview(sweeps), differing(sweeps)]))
    return render("Sweeps compared", sections)


def spread_note(sweeps: Sequence[ComparedSweep]) -> str:
    """Explains what the spread of the pooled figures covers, and what the intervals cover."""
    units = {compared_sweeps.unit_of(group) for group in compared_sweeps.seed_groups(sweeps)}
    over = " or ".join(sorted(units))
    return (
        f"Sweeps that differ in the seed alone. The spread here is over {over}, one value each: its standard deviation "
        "(n - 1) and range. The intervals above are over prompts within one of them, and say nothing about another. "
        "Each seed also draws its own rows, so the spread holds that of prompts too."
    )


def side_by_side(sweeps: Sequence[ComparedSweep]) -> list[Table]:
    """The figures, a table for each subset, with a column for each sweep."""
    figures = compared_sweeps.figures_of(sweeps)
    tables = []
    for subset in figures["subset"].unique():
        subset_figures = figures[figures["subset"] == subset]
        rows = []
        for figure in _order(subset_figures["figure"].unique()):
            by_sweep = subset_figures[subset_figures["figure"] == figure].set_index("sweep")
            texts = [_text(by_sweep, sweep.name) for sweep in sweeps]
            rows.append([figure, *texts])
        title, help = f"{subset}", f"95% intervals over prompts{_counts(sweeps, subset)}; -: not measured."
        tables.append(Table(title, help, ["", *(sweep.name for sweep in sweeps)], rows))
    return tables


def _order(figures: Iterable[str]) -> list[str]:
    """Figures of rates last, whichever sweep has them."""
    return sorted(figures, key=lambda figure: " rate, " in figure)


def _text(by_sweep: pd.DataFrame, name: str) -> str:
    if name not in by_sweep.index:
        return "-"
    row = by_sweep.loc[name]
    if math.isnan(row["value"]):
        return {FEATURES: "none found", SHARE: "no clear effect"}.get(row["figure"], "nothing to recover")
    if row["figure"] == FEATURES:
        return f"{row['value']:.0f}"
    ends = pd.Series({"value": row["value"], "value_low": row["low"], "value_high": row["high"]})
    return with_interval(ends, "value", signed=row["figure"] == GAP)


def _counts(sweeps: Sequence[ComparedSweep], subset: str) -> str:
    counts = [
        int(sweep.finetuned[sweep.finetuned["subset"] == subset]["n_examples"].iloc[0])
        for sweep in sweeps
        if len(sweep.finetuned) and (sweep.finetuned["subset"] == subset).any()
    ]
    if not counts:
        return ""
    return f", n = {min(counts)}" + (f" to {max(counts)}" if max(counts) > min(counts) else "")


def pooled_tables(sweeps: Sequence[ComparedSweep]) -> list[Table]:
    """Mean and spread of each figure over sweeps that differ in the seed alone, a table for each such group."""
    tables = []
    for group in compared_sweeps.seed_groups(sweeps):
        unit = compared_sweeps.unit_of(group)
        rows = [
            [
                row["subset"],
                row["figure"],
                _plain_number(row["mean"], row["figure"]),
                _plain_number(row["sd"], row["figure"], scale=abs(row["mean"])),
                "-"
                if row["n"] == 0
                else " to ".join(_plain_number(row[end], row["figure"]) for end in ("low", "high")),
                str(row["n"]),
            ]
            for _, row in _rates_last(compared_sweeps.pooled(group)).iterrows()
        ]
        names = ", ".join(sweep.name for sweep in group)
        seeds = ", ".join(str(sweep.seed) for sweep in group)
        header = ["subset", "figure", "mean", "sd", "range", f"n {unit}"]
        help = f"They differ in the seed alone ({seeds}); mean, sd and range are over {unit}."
        tables.append(Table(f"{len(group)} {unit}: {names}", help, header, rows))
    return tables


def _rates_last(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of each subset in the order of the tables above."""
    return pd.concat(
        [
            rows[rows["figure"] == figure]
            for _, rows in table.groupby("subset", sort=False)
            for figure in _order(rows["figure"])
        ]
    )


def _plain_number(value: float, figure: str, scale: float | None = None) -> str:
    """With the sign of a gap; `scale` is the mean where `value` is its spread, which has no sign."""
    if figure == FEATURES and not math.isnan(value):
        return f"{value:.0f}"
    return number(value, signed=figure == GAP and scale is None, scale=scale and max(scale, value))


def overview(sweeps: Sequence[ComparedSweep]) -> Table:
    """The compared sweeps: where they are stored, their pair, seed and layers."""
    rows = [
        [
            sweep.name,
            str(sweep.settings.get("model.source", "-")),
            str(sweep.settings.get("model.finetuned", "trained here (LoRA)")),
            str(sweep.seed),
            sweep.layers or "-",
            sweep.where,
        ]
        for sweep in sweeps
    ]
    help = "The layers are the largest set in which deltas were spliced."
    return Table("The sweeps", help, ["sweep", "model", "finetuned model", "seed", "layers", "from"], rows)


def differing(sweeps: Sequence[ComparedSweep]) -> Table:
    """The settings that differ, with a column for each sweep."""
    differing_settings = compared_sweeps.settings_that_differ(sweeps)
    rows = [[key, *(_shown(value) for value in values)] for key, values in differing_settings.items()]
    help = "-: not set. Where and how fast a sweep ran is left out." if rows else "No setting differs."
    header = ["setting", *(sweep.name for sweep in sweeps)]
    return Table("Settings that differ", help, header, rows, wide_text=True)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= LONGEST_VALUE else f"{text[: LONGEST_VALUE - 3]}..."


def knobs(sweeps: Sequence[ComparedSweep]) -> Figure:
    """CE above and the first rate below against alpha, a column per subset, a colour and marker per sweep.

    Sweeps that differ in the seed alone share a colour: thin lines, and a thick one for their mean.
    """
    shown = [sweep for sweep in sweeps if len(sweep.dose)]
    subsets = list(dict.fromkeys(subset for sweep in shown for subset in sweep.dose["subset"]))
    rates = list(dict.fromkeys(sweep.rate for sweep in shown if sweep.rate is not None))
    width = max(INCHES_PER_PANEL, 7.0 / len(subsets))  # the legend needs some
    figure, grid = panels((1 + bool(rates)) * len(subsets), columns=len(subsets), width=width, height=2.7)
    for index, axes in enumerate(grid):
        subset, is_rate = subsets[index % len(subsets)], index >= len(subsets)
        _one_panel(axes, shown, subset, is_rate)
        axes.set_xlabel("alpha")
        if is_rate:
            axes.set_ylim(-0.05, 1.05)
        else:
            axes.set_title(plain(subset))
            axes.set_ylim(bottom=0)
        if index % len(subsets) == 0:
            axes.set_ylabel(_spoken(rates) if is_rate else CE)
    counts = pd.concat([sweep.dose["n_examples"] for sweep in shown])
    low, high = int(counts.min()), int(counts.max())
    count = f"n = {low if low == high else f'{low} to {high}'} prompts per subset"
    grouped = "; thin: one seed each, thick: their mean" if compared_sweeps.seed_groups(shown) else ""
    return finish(figure, grid[0], f"{count}; bands: bootstrap (CE) and Wilson (rate) 95% over prompts{grouped}")


def _spoken(rates: Sequence[str]) -> str:
    if len(rates) > 1:
        return "share of prompts: first behaviour"
    return f"share of prompts: {rates[0].removesuffix(RATE).replace('_', ' ')}"


def _one_panel(axes: Axes, sweeps: Sequence[ComparedSweep], subset: str, is_rate: bool) -> None:
    """A single sweep is drawn with its band, a group of seeds as thin lines and their mean."""
    groups = compared_sweeps.seed_groups(sweeps)
    group_of = {sweep.name: group for group in groups for sweep in group}
    colours: dict[str, int] = {}
    for index, sweep in enumerate(sweeps):
        first = group_of.get(sweep.name, [sweep])[0].name
        look_number = colours.setdefault(first, len(colours))
        column = sweep.rate if is_rate else "mean_ce"
        rows = sweep.dose[sweep.dose["subset"] == subset].sort_values("alpha")
        rows = rows.dropna(subset=[column]) if column in rows else rows.iloc[:0]
        colour, marker = look(look_number)[0], look(index)[1]
        if sweep.name in group_of:
            style: dict[str, Any] = {"linewidth": 0.8, "alpha": 0.6, "marker": marker, "markersize": 4}
            values = rows[column] if len(rows) else []
            axes.plot(rows["alpha"] if len(rows) else [], values, color=colour, label=plain(sweep.name), **style)
        elif len(rows):
            band(axes, rows, str(column), label=plain(sweep.name), number=look_number)
        else:
            axes.plot([], [], color=colour, marker=look(look_number)[1], label=plain(sweep.name))  # for the legend
        raw = sweep.finetuned[sweep.finetuned["subset"] == subset] if len(sweep.finetuned) else sweep.finetuned
        if len(raw) and column in raw and not pd.isna(raw[column].iloc[0]):
            axes.axhline(float(raw[column].iloc[0]), color=colour, linestyle=":", linewidth=1)
    for group in groups:
        means = _mean_curve(group, subset, is_rate)
        label = f"mean of {len(group)} {compared_sweeps.unit_of(group)}"
        if len(groups) > 1:
            label += f": {plain(group[0].name)}, ..."
        colour = look(colours[group[0].name])[0]
        axes.plot(means.index, means.to_numpy(), color=colour, linewidth=2.6, alpha=0.9, label=label, zorder=3)


def _mean_curve(group: Sequence[ComparedSweep], subset: str, is_rate: bool) -> pd.Series:
    """Over the sweeps of a group, at the strengths that all of them have."""
    curves = []
    for sweep in group:
        rows = sweep.dose[sweep.dose["subset"] == subset]
        column = sweep.rate if is_rate else "mean_ce"
        if column in rows:
            curves.append(rows.set_index("alpha")[column])
    if not curves:
        return pd.Series(dtype=float)
    return pd.concat(curves, axis=1, join="inner").dropna().mean(axis=1).sort_index()


def records(sweeps: Sequence[ComparedSweep]) -> list[dict[str, Any]]:
    """Every figure of every sweep, then those pooled over seeds, as plain rows with equal keys; None for undefined.

    `kind` is `sweep`, with `low` and `high` the ends of the 95% interval over prompts, or `pooled`, where they are the
    smallest and largest value of the `n` sweeps and `sd` their spread.
    """
    seeds = {sweep.name: sweep.seed for sweep in sweeps}
    rows: list[dict[str, Any]] = []
    for _, row in compared_sweeps.figures_of(sweeps).iterrows():
        rows.append({"kind": "sweep", "seed": seeds[row["sweep"]], "sd": None, "n": None, **row})
    for group in compared_sweeps.seed_groups(sweeps):
        for _, row in compared_sweeps.pooled(group).iterrows():
            pooled = {"kind": "pooled", "seed": None, "sweep": row["sweeps"], "value": row["mean"]}
            rows.append(pooled | {name: row[name] for name in ("subset", "figure", "low", "high", "sd", "n")})
    names = ("kind", "sweep", "seed", "subset", "figure", "value", "low", "high", "sd", "n")
    return [{name: None if pd.isna(record[name]) else record[name] for name in names} for record in rows]

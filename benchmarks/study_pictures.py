"""Pictures over several adapters, from the files that `benchmarks.study` collects.

In: the folder of the files. Out: `knob.png`, `widths.png` and `layers.png` next to them, in the style of the reports.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from evaluators.report.figures import DPI, MUTED, finish, look, panels, plain

METRICS = {"mean_ce": "CE (nats per target token)", "tool_call_rate": "share of prompts: calls"}


def split(table: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Splits `what` into columns."""
    parts = table["what"].str.split(": ", expand=True)
    return table.assign(**{name: parts[number] for number, name in enumerate(names)})


def knob(doses: pd.DataFrame) -> Figure:
    """CE and calls against alpha, one line per adapter; the dense knob is dotted."""
    doses = split(doses, "metric", "series", "alpha")
    subsets, adapters = list(doses["subset"].unique()), list(doses["adapter"].unique())
    figure, grid = panels(len(METRICS) * len(subsets), columns=len(subsets), height=2.7)
    for index, axes in enumerate(grid):
        subset, metric = subsets[index % len(subsets)], list(METRICS)[index // len(subsets)]
        for number, adapter in enumerate(adapters):
            colour, marker = look(number)
            for series, style in (("deltas", "-"), ("scaled weights", ":")):
                drawn = doses[(doses["subset"] == subset) & (doses["metric"] == metric) & (doses["adapter"] == adapter)]
                drawn = drawn[drawn["series"] == series]
                for seed, lines in drawn.groupby("seed"):
                    lines = lines.assign(alpha=lines["alpha"].astype(float)).sort_values("alpha")
                    label = f"{adapter}: {series}" if seed == drawn["seed"].min() else None
                    size = 3 if style == "-" else 0
                    axes.plot(
                        lines["alpha"], lines["value"], style, color=colour, linewidth=1, alpha=0.8, label=label,
                        marker=marker, markersize=size,
                    )  # fmt: skip
        axes.set_xlabel("alpha")
        if metric == "mean_ce":
            axes.set_title(plain(subset))
            axes.set_ylim(bottom=0)
        if index % len(subsets) == 0:
            axes.set_ylabel(METRICS[metric])
    return finish(figure, grid[0], "one line an adapter; alpha 0: un-finetuned MLPs")


def widths(table: pd.DataFrame) -> Figure:
    """The recovered share of the CE gap by width: the mean over adapters and their range."""
    table = split(table, "series", "width")
    table = table.assign(width=table["width"].astype(int))
    places = table[["adapter", "subset"]].drop_duplicates().itertuples(index=False)
    shown = [(adapter, subset) for adapter, subset in places]
    figure, grid = panels(len(shown), columns=table["subset"].nunique(), height=2.7)
    for axes, (adapter, subset) in zip(grid, shown, strict=True):
        panel_rows = table[(table["adapter"] == adapter) & (table["subset"] == subset)]
        for number, (series, lines) in enumerate(panel_rows.groupby("series", sort=False)):
            colour, marker = look(number)
            spread = lines.groupby("width")["value"].agg(["mean", "min", "max"])
            axes.plot(spread.index, spread["mean"], color=colour, marker=marker, label=str(series))
            axes.fill_between(spread.index, spread["min"], spread["max"], color=colour, alpha=0.15, linewidth=0)
        axes.axhline(1, color=MUTED, linewidth=1)
        axes.set_xscale("log", base=2)
        tried = sorted(panel_rows["width"].unique())
        axes.set_xticks(tried, [str(width) for width in tried])
        axes.set(title=f"{adapter}, {plain(subset)}", xlabel="d_new, features a layer")
        axes.set_ylim(-0.05, 1.1)
    grid[0].set_ylabel("share of the CE gap recovered")
    return finish(figure, grid[0], "alpha 1, all layers; bands: lowest to highest adapter")


def layers(table: pd.DataFrame) -> Figure | None:
    """The cost of swapping each layer alone; None if no layer was swapped alone."""
    table = split(table, "of", "layer")
    table = table[table["layer"].str.fullmatch(r"\d+") & (table["of"] == "gap")]
    if table.empty:
        return None
    adapters = list(table["adapter"].unique())
    figure, grid = panels(len(adapters), columns=1, width=7.0, height=2.0)
    for axes, adapter in zip(grid, adapters, strict=True):
        for number, (subset, lines) in enumerate(table[table["adapter"] == adapter].groupby("subset", sort=False)):
            colour, marker = look(number)
            lines = lines.assign(layer=lines["layer"].astype(int)).sort_values("layer")
            bars = [lines["value"] - lines["low"], lines["high"] - lines["value"]]
            positions = lines["layer"] + 0.2 * (number - 1)
            axes.errorbar(
                positions, lines["value"], yerr=bars, color=colour, marker=marker, markersize=3, linestyle="none",
                label=plain(str(subset)),
            )  # fmt: skip
        axes.axhline(0, color=MUTED, linewidth=1)
        axes.set_ylabel(f"{adapter}:\nCE gap (nats)")
    grid[-1].set_xlabel("the one layer whose MLP is un-finetuned")
    seeds = ", ".join(map(str, sorted(table["seed"].unique())))
    return finish(figure, grid[0], f"seed {seeds}; bars: paired bootstrap 95% over prompts")


def write_pictures(folder: Path) -> None:
    for name, make, table in (("knob", knob, "doses"), ("widths", widths, "widths"), ("layers", layers, "places")):
        figure = make(pd.read_csv(folder / f"{table}.csv"))
        if figure is not None:
            figure.savefig(folder / f"{name}.png", dpi=DPI, facecolor="white", metadata={"Software": None})

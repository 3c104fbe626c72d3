"""Pictures over several adapters, from the files that `benchmarks.study` collects.

In: the folder of the files. Out: `knob.png` and `groups.png` next to them, in the style of the reports.
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from evaluators.report.figures import DPI, MUTED, finish, look, panels, plain

METRICS = {"mean_ce": "CE (nats per target token)", "tool_call_rate": "share of prompts: calls"}
SUBSETS = ("tool", "copy", "tool_ood")


def split(table: pd.DataFrame, *names: str) -> pd.DataFrame:
    """Splits `what` into columns."""
    parts = table["what"].str.split(": ", expand=True)
    return table.assign(**{name: parts[number] for number, name in enumerate(names)})


def knob(doses: pd.DataFrame) -> Figure:
    """CE and calls against alpha, one line per adapter; the dense knob is dotted."""
    doses = split(doses, "metric", "series", "alpha")
    doses = doses[doses["subset"].isin(SUBSETS)]
    subsets, adapters = list(SUBSETS), list(doses["adapter"].unique())
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
    return finish(figure, grid[0], "one line a model; alpha 0: its sites un-finetuned")


def groups(table: pd.DataFrame) -> Figure:
    """What the first groups recover, against as many random features: a panel for each adapter and subset."""
    table = split(table, "of", "number").astype({"number": int})
    table = table[table["subset"].isin(("tool", "tool_ood", "polite"))]
    panes = list(table[["adapter", "subset"]].drop_duplicates().itertuples(index=False, name=None))
    figure, grid = panels(len(panes), columns=4, height=2.5)
    for axes, (adapter, subset) in zip(grid, panes, strict=True):
        of_panel = table[(table["adapter"] == adapter) & (table["subset"] == subset)]
        for index, (of, label) in enumerate({"groups": "groups", "random": "as many random features"}.items()):
            colour, marker = look(index)
            for seed, lines in of_panel[of_panel["of"] == of].groupby("seed"):
                axes.plot(
                    lines["number"], lines["value"], color=colour, marker=marker, markersize=3, linewidth=1,
                    label=label if seed == of_panel["seed"].min() else None,
                )  # fmt: skip
        axes.axhline(1, color=MUTED, linewidth=1)
        axes.set_xscale("symlog", base=2, linthresh=1)
        numbers = [0, 1, 2, 4, 8, 16]
        axes.set_xticks(numbers, [str(number) for number in numbers])
        axes.set(title=f"{adapter}, {plain(subset)}", xlabel="groups that are on", xlim=(-0.2, None))
    grid[0].set_ylabel("share of the CE gap recovered")
    return finish(figure, grid[0], "one line a model; 0: the features at BOS alone")


def write_pictures(folder: Path) -> None:
    for name, make, table in (("knob", knob, "doses"), ("groups", groups, "few_groups")):
        figure = make(pd.read_csv(folder / f"{table}.csv"))
        figure.savefig(folder / f"{name}.png", dpi=DPI, facecolor="white", metadata={"Software": None})

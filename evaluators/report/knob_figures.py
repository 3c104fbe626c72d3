"""Pictures of what finetuning changed: in which parts, the knob, how few features are enough, and in which layers.

In: the tables of parts, dose-response, conditions, curve and delta trials. Out: matplotlib Figures in the report's
style.
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from evaluators.conditions import CHANGE_CONTROLS, CONDITIONS
from evaluators.report.figures import MUTED, band, finish, look, panels, plain, whiskers
from evaluators.tables.pooling import RATE, rates_in
from evaluators.tables.recovery import ENOUGH, EVERY_LAYER
from sites import KINDS, Site, parse_sites

MOST_SUBSETS = 3
"""Panels side by side in the picture of parts, one per subset."""
WAYS = {"unfinetuned": "lost: only this un-finetuned", "finetuned": "brought: only this finetuned"}
SERIES = {"alpha": CONDITIONS["alpha"]} | {name: control for name, control in CHANGE_CONTROLS.items() if control.dosed}


def where_it_lives(parts: pd.DataFrame, *, seed: int) -> Figure:
    """For each part of the model: the share of finetuning's effect on CE that is lost without the part, and the share
    that the part brings alone. One column per subset; below, thirds of the layers if they were measured. At least one
    row of `parts` must have a share."""
    shares = parts.dropna(subset=["share"])
    subsets = list(shares["subset"].unique())[:MOST_SUBSETS]
    shares = shares[shares["subset"].isin(subsets)]
    is_all = shares["layers"] == EVERY_LAYER
    lines = [(rows, name) for rows, name in ((shares[is_all], "part"), (shares[~is_all], "layers")) if len(rows)]
    figure, grid = panels(len(lines) * len(subsets), columns=len(subsets), width=4.2, height=2.5)
    low, high = float(shares["share_low"].clip(lower=-1).min()), float(shares["share_high"].clip(upper=2).max())
    for index, axes in enumerate(grid):
        rows, name = lines[index // len(subsets)]
        labels = list(rows[name].unique())
        subset_rows = rows[rows["subset"] == subsets[index % len(subsets)]]
        for number, (way, label) in enumerate(WAYS.items()):
            bars = subset_rows[subset_rows["way"] == way]
            at = [labels.index(value) + 0.4 * (number - 0.5) for value in bars[name]]
            axes.bar(at, bars["share"], 0.38, color=look(number)[0], label=label)
            axes.errorbar(
                at, bars["share"], yerr=whiskers(bars, "share"), color="black", capsize=2, elinewidth=1,
                linestyle="none",
            )  # fmt: skip
        axes.axhline(0, color=MUTED, linewidth=1)
        axes.axhline(1, color=MUTED, linewidth=1, linestyle="--")
        axes.set_xticks(range(len(labels)), labels)
        axes.set_xlim(-0.7, len(labels) - 0.3)
        axes.set_ylim(min(-0.05, low - 0.05), max(1.1, high + 0.05))
        if index < len(subsets):
            axes.set_title(plain(subsets[index]))
        if index % len(subsets) == 0:
            axes.set_ylabel("share of the effect in CE")
        axes.set_xlabel("part of the model" if name == "part" else "layers, all parts but the rest")
    fewest, most = shares["n_examples"].min(), shares["n_examples"].max()
    count = f"n = {fewest if fewest == most else f'{fewest} to {most}'} prompts per subset"
    return finish(figure, grid[0], f"{count}; bars: paired bootstrap 95% over prompts, seed {seed}; dashed: all of it")


def knob(dose: pd.DataFrame, conditions: pd.DataFrame, *, seed: int) -> Figure:
    """CE and the first rate against alpha for one set of layers, one column per subset. The series: the deltas, weights
    interpolated between un-finetuned and finetuned, and random directions at full strength. The dotted line is the
    finetuned model."""
    subsets = list(dose["subset"].unique())
    metrics = {"mean_ce": "CE (nats per target token)"} | {rate: _spoken(rate) for rate in rates_in(conditions)[:1]}
    figure, grid = panels(len(metrics) * len(subsets), columns=len(subsets), height=2.7)
    raw = conditions[conditions["condition"] == "raw"].set_index("subset")
    random = conditions[conditions["condition"] == "random_delta"]
    for index, axes in enumerate(grid):
        subset, metric = subsets[index % len(subsets)], list(metrics)[index // len(subsets)]
        for number, (condition, drawn) in enumerate(SERIES.items()):
            rows = dose[(dose["subset"] == subset) & (dose["condition"] == condition)].sort_values("alpha")
            if len(rows):
                band(axes, rows, metric, label=drawn.label or condition, number=number)
        _random(axes, random[random["subset"] == subset], metric)
        axes.axhline(float(raw.loc[subset, metric]), color="black", linestyle=":", linewidth=1.2, label="finetuned")
        axes.set_xlabel("alpha")
        if metric == "mean_ce":
            axes.set_title(plain(subset))
            axes.set_ylim(bottom=0)
        else:
            axes.set_ylim(-0.05, 1.05)
        if index % len(subsets) == 0:
            axes.set_ylabel(metrics[metric])
    low, high = dose["n_examples"].min(), dose["n_examples"].max()
    count = f"n = {low if low == high else f'{low} to {high}'} prompts per subset"
    note = f"alpha 0: un-finetuned sites; {count}; bands: bootstrap (CE, seed {seed}) and Wilson (rate) 95%"
    return finish(figure, grid[0], note)


def _spoken(rate: str) -> str:
    return f"share of prompts: {rate.removesuffix(RATE).replace('_', ' ')}"


def _random(axes: Axes, rows: pd.DataFrame, metric: str) -> None:
    if rows.empty:
        return
    colour, marker = look(3)
    axes.errorbar(
        [1.0], rows[metric], yerr=whiskers(rows, metric), color=colour, marker=marker, capsize=2, linestyle="none",
        label="random directions",
    )  # fmt: skip


def recovered_by_count(curve: pd.DataFrame, *, seed: int) -> Figure:
    """The share of the CE gap that the k most effective features, over all layers, recover alone."""
    figure, (axes,) = panels(1, width=6.5, height=3.4)
    for number, subset in enumerate(list(curve["subset"].unique())):
        rows = curve[(curve["subset"] == subset) & (curve["k"] > 0)].dropna(subset=["recovered"])
        if len(rows):
            band(axes, rows.rename(columns={"k": "alpha"}), "recovered", label=plain(subset), number=number)
    axes.axhline(1, color=MUTED, linewidth=1)
    axes.axhline(ENOUGH, color=MUTED, linestyle="--", linewidth=1)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="features kept, of all layers, the most effective first", ylabel="share of the CE gap recovered")
    axes.set_ylim(min(-0.05, float(curve["recovered_low"].clip(lower=-0.5).min())), 1.1)
    note = f"bands: paired bootstrap 95% over prompts, seed {seed}; dashed: {ENOUGH:.0%}; ranked on held-out rows"
    return finish(figure, axes, note)


WIDTHS = {"full": CONDITIONS["full"]} | {name: control for name, control in CHANGE_CONTROLS.items() if control.ranked}


def recovered_by_width(widths: pd.DataFrame, *, seed: int) -> Figure:
    """The share of the CE gap that the deltas of each width recover, next to controls of the same rank; one panel per
    subset."""
    rows = widths[widths["metric"] == "mean_ce"].dropna(subset=["recovered"])
    subsets, tick_widths = list(rows["subset"].unique()), sorted(rows["d_new"].astype(int).unique())
    figure, grid = panels(len(subsets), columns=len(subsets), height=2.7)
    for axes, subset in zip(grid, subsets, strict=True):
        for number, (condition, drawn) in enumerate(WIDTHS.items()):
            points = rows[(rows["subset"] == subset) & (rows["condition"] == condition)].sort_values("d_new")
            if len(points):
                points = points.assign(alpha=points["d_new"].astype(float))
                band(axes, points, "recovered", label=drawn.label or condition, number=number)
        axes.axhline(1, color=MUTED, linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set_xticks(tick_widths, [str(width) for width in tick_widths])
        axes.set(title=plain(subset), xlabel="d_new, features per layer")
    low = float(rows["recovered_low"].clip(lower=-1).min())
    for axes in grid:
        axes.set_ylim(min(-0.05, low), 1.1)
    grid[0].set_ylabel("share of the CE gap recovered")
    return finish(figure, grid[0], f"alpha 1, all layers; bands: paired bootstrap 95% over prompts, seed {seed}")


def where_it_is(deltas: pd.DataFrame, gaps: pd.DataFrame, recovered: pd.DataFrame) -> Figure:
    """Where in the network the change is. By layer and kind of site: how much of the output finetuning changed, and how
    much of that the deltas leave unexplained. By set of layers and subset: its CE gap as a share of the whole effect,
    and how much of the gap is recovered."""
    best = deltas[(deltas["target"] == "change") & deltas["best"].astype(bool)]
    places = best["layer"].map(Site.parse)
    best = best.assign(layer=[site.layer for site in places], kind=[site.kind.name for site in places])
    best = best.sort_values("layer", kind="stable")
    full = recovered[(recovered["target"] == "change") & (recovered["condition"] == "full")]
    by_set = [
        (gaps[gaps["metric"] == "mean_ce"].dropna(subset=["share"]), "share", "share of the\nwhole effect"),
        (full[full["metric"] == "mean_ce"].dropna(subset=["recovered"]), "recovered", "recovered\nof that"),
    ]
    by_set = [panel for panel in by_set if len(panel[0])]
    figure, grid = panels(2 + len(by_set), columns=1, width=7.0, height=2.0)
    shares = best.drop_duplicates(["layer", "kind"])
    kinds = [name for name in KINDS if name in set(best["kind"])]
    for number, kind in enumerate(kinds):
        rows = shares[shares["kind"] == kind]
        if len(kinds) == 1:
            grid[0].bar(rows["layer"], rows["change_share"], color=MUTED)
        else:
            colour, marker = look(number)
            grid[0].plot(rows["layer"], rows["change_share"], color=colour, marker=marker, label=kind)
    if len(kinds) > 1:
        grid[0].legend(frameon=False, fontsize=8, ncols=4, loc="upper right")
    grid[0].set_yscale("log")
    grid[0].set_ylabel("changed share\nof the output")
    lines = list(best.groupby("d_new")) if len(kinds) == 1 else []
    lines += [
        (kind, best[(best["kind"] == kind) & (best["d_new"] == best["d_new"].max())]) for kind in kinds[1:] and kinds
    ]
    for number, (which, rows) in enumerate(lines):
        colour, marker = look(number)
        label = f"d_new {which}" if len(kinds) == 1 else f"{which}, d_new {rows['d_new'].max()}"
        grid[1].plot(rows["layer"], rows["val_unexplained"], color=colour, marker=marker, label=label)
    grid[1].set_ylim(0, max(1.0, float(best["val_unexplained"].max())))
    grid[1].set_ylabel("unexplained\nshare of it")
    grid[1].legend(frameon=False, fontsize=8, ncols=4, loc="upper right")
    order = list(dict.fromkeys(gaps["subset"]))
    for axes, (rows, column, label) in zip(grid[2:], by_set, strict=True):
        _sets(axes, rows, column, order)
        axes.set_ylabel(label)
        axes.axhline(1, color=MUTED, linewidth=1)
        axes.set_ylim(min(0.0, float(rows[column].min())) - 0.05, max(1.0, float(rows[column].max())) + 0.1)
    for axes in grid:
        axes.set_xlim(-0.8, best["layer"].max() + 0.8)
    grid[-1].set_xlabel("layer")
    note = (
        "above: held-out tokens; below: evaluation prompts, bars paired bootstrap 95%; sets without a gap are left out"
    )
    return finish(figure, grid[2 if by_set else -1], note)


STYLES = {"mlp": "-", "o": "--", "qkv": ":"}
"""Lines of sets with sites of one kind; others are drawn like MLPs."""


def _sets(axes: Axes, rows: pd.DataFrame, column: str, subsets: Sequence[str]) -> None:
    """A line across the layers of each set, except the set of all layers; one colour per subset, side by side, and, if
    there are sets of one kind of site, a style per kind. The legend is complete whatever is drawn."""
    most = max(len(parse_sites(label)) for label in rows["layer"])
    smaller_sets = rows[rows["layer"].map(lambda label: len(parse_sites(label)) < most)]
    shown = smaller_sets if len(smaller_sets) else rows
    kinds_of = {label: {site.kind.name for site in parse_sites(label)} for label in shown["layer"]}
    kinds = [name for name in KINDS if {name} in kinds_of.values()]
    styles = STYLES if len(kinds) > 1 else {}
    places = len(subsets) * max(1, len(kinds)) + 1
    for number, subset in enumerate(subsets):
        colour, marker = look(number)
        axes.plot([], [], color=colour, marker=marker, markersize=4, label=plain(subset))
        for _, row in shown[shown["subset"] == subset].iterrows():
            layers, (kind, *more) = [site.layer for site in parse_sites(row["layer"])], sorted(kinds_of[row["layer"]])
            ends: Sequence[float] = (min(layers) - 0.4, max(layers) + 0.4)
            style = "-" if more else styles.get(kind, "-")
            axes.plot(ends, [row[column]] * 2, style, color=colour, linewidth=2, alpha=0.7)
            step = number * max(1, len(kinds)) + (kinds.index(kind) if kind in kinds and not more else 0)
            at = ends[0] + (ends[1] - ends[0]) * (step + 1) / places
            bars = whiskers(pd.DataFrame([row]), column)
            axes.errorbar([at], [row[column]], yerr=bars, color=colour, marker=marker, markersize=4, capsize=2)
    for kind in kinds if styles else ():
        axes.plot([], [], styles[kind], color=MUTED, linewidth=2, label=kind)

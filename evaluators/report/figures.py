"""The report's pictures, one function each.

In: the tables of `evaluators.tables` and the trials of the two searches. Out: matplotlib Figures (Agg, nothing shown,
nothing saved). The colours are Okabe and Ito's, which any colour vision can distinguish. Whiskers and bands are 95%
intervals.
"""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from evaluators.tables.pooling import rates_in
from sites import NOTHING, is_set, label_order, parse_sites

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
MUTED = "#6b7280"
INCHES_PER_PANEL = 3.5
DPI = 130

HEATMAP_TITLES = {
    "mean_dce_full": "Mean CE increase, base + delta\n(nats per token)",
    "max_dce_full": "Worst layer's CE increase, base + delta\n(nats per token)",
    "mean_dce_base": "Mean CE increase, base alone\n(nats per token)",
    "mean_cos_full": "Mean cosine to the true output, base + delta",
    "mean_cos_base": "Mean cosine to the true output, base alone",
    "mean_l2_full": "Mean relative error ||recon - y|| / ||y||,\nbase + delta",
    "mean_l2_base": "Mean relative error ||recon - y|| / ||y||,\nbase alone",
}


def short_layer(label: str) -> str:
    """Axis text for a layer label; a long set is given as its number of layers."""
    count = len(parse_sites(label))
    return label if len(label) <= 8 else f"{count}\nlayers"


def combination_heatmap(summary: pd.DataFrame, column: str) -> Figure:
    """One column of the reconstruction summary as a heatmap of d_new by percentile, with the values written in."""
    grid = summary.pivot_table(index="d_new", columns="percentile", values=column, dropna=False)
    figure, (axes,) = panels(1, width=4.0, height=3.1)
    image = axes.imshow(grid.to_numpy(dtype=float), cmap="cividis", aspect="auto")
    axes.grid(False)
    axes.set_xticks(range(grid.shape[1]), [f"{value:g}" for value in grid.columns])
    axes.set_yticks(range(grid.shape[0]), [f"{value:g}" for value in grid.index])
    axes.set(xlabel="percentile of the base's L0", ylabel="d_new (delta features)", title=HEATMAP_TITLES[column])
    middle = sum(image.get_clim()) / 2
    for (row, col), value in np.ndenumerate(grid.to_numpy(dtype=float)):
        if math.isfinite(value):
            axes.text(col, row, f"{value:.3g}", ha="center", va="center", color="black" if value > middle else "white")
    figure.colorbar(image, ax=axes)
    return figure


def delta_ce_by_layer(conditions: pd.DataFrame, *, seed: int) -> Figure:
    """CE minus raw CE by layer: one panel per subset on a shared scale, one series per condition; zero is raw."""
    table = _spliced(conditions)
    subsets = list(table["subset"].unique())
    figure, grid = panels(len(subsets), sharey=True)
    for axes, subset in zip(grid, subsets, strict=True):
        _by_layer(axes, table[table["subset"] == subset], "delta_ce")
        axes.axhline(0, color=MUTED, linewidth=1)
        axes.set(title=plain(subset), xlabel="spliced layer")
    grid[0].set_ylabel("CE - raw CE (nats per target token)")
    return finish(figure, grid[0], f"{_count(table)}; bars: paired bootstrap 95% over prompts, seed {seed}")


def plain(label: str) -> str:
    """Escapes a user's label: matplotlib reads text between dollar signs as a formula, and hides a label that begins
    with an underscore."""
    return (" " if label.startswith("_") else "") + label.replace("$", r"\$")


def behaviour_by_layer(conditions: pd.DataFrame, subset: str) -> Figure:
    """Every rate that is defined on the subset, by layer, with Wilson intervals; the dotted line is raw."""
    table = conditions[conditions["subset"] == subset]
    rates = [rate for rate in rates_in(table) if table[rate].notna().any()]
    figure, grid = panels(len(rates))
    raw = table[table["layer"] == NOTHING]
    for axes, rate in zip(grid, rates, strict=True):
        _by_layer(axes, _spliced(table), rate)
        if len(raw):
            axes.axhline(float(raw[rate].iloc[0]), color="black", linestyle=":", linewidth=1.2, label="raw")
        axes.set(title=rate, xlabel="spliced layer", ylim=(-0.05, 1.05))
    grid[0].set_ylabel(f"share of {plain(subset)} prompts")
    return finish(figure, grid[0], f"{_count(table)}; bars: Wilson 95%")


def activations_by_layer(conditions: pd.DataFrame, *, seed: int) -> Figure:
    """Sum of |activation| per token under `full`, by layer: a panel each for base and delta, one series per subset."""
    table = conditions[conditions["condition"] == "full"]
    columns = {"mean_abs_base_acts": "base transcoder", "mean_abs_delta_acts": "delta transcoder"}
    figure, grid = panels(2)
    for axes, (column, title) in zip(grid, columns.items(), strict=True):
        _by_layer(axes, table, column, series="subset")
        axes.set(title=title, xlabel="spliced layer")
        axes.set_ylim(bottom=0)
    grid[0].set_ylabel("sum of |activation| per token")
    return finish(figure, grid[0], f"{_count(table)}; bars: bootstrap 95% over prompts, seed {seed}")


def dose_response(table: pd.DataFrame, *, seed: int) -> Figure:
    """CE minus raw CE, and every rate, against alpha; one series per subset.

    `table` holds the rows of the dose-response table for one layer or set, percentile and d_new.
    """
    metrics = ["delta_ce", *(rate for rate in rates_in(table) if table[rate].notna().any())]
    figure, grid = panels(len(metrics), columns=3)
    subsets = list(table["subset"].unique())
    for axes, metric in zip(grid, metrics, strict=True):
        for number, subset in enumerate(subsets):
            rows = table[table["subset"] == subset].dropna(subset=[metric]).sort_values("alpha")
            band(axes, rows, metric, label=plain(subset), number=number)
        if metric == "delta_ce":
            axes.axhline(0, color=MUTED, linewidth=1)
            axes.set(title="CE - raw CE", ylabel="nats per target token")
        else:
            axes.set(title=metric, ylabel="share of prompts", ylim=(-0.05, 1.05))
        axes.set_xlabel("alpha (strength of the delta)")
    layer = f"layer {table['layer'].iloc[0]}"
    note = f"bands: paired bootstrap (CE, seed {seed}) and Wilson (rates) 95%"
    return finish(figure, grid[0], f"{layer}; {_count(table)}; {note}")


def unexplained_variance(delta_trials: pd.DataFrame) -> Figure:
    """Held-out FVU of the kept deltas against d_new: one panel per layer, one series per percentile.

    Small dots are replicas of the kept trial with other seeds; the dashed line of the same colour is the base alone.
    """
    kept = delta_trials[delta_trials["best"].astype(bool)]
    layers = sorted(kept["layer"].unique())
    widths = sorted(kept["d_new"].unique())
    figure, grid = panels(len(layers), columns=4, width=2.9)
    for axes, layer in zip(grid, layers, strict=True):
        groups = kept[kept["layer"] == layer].sort_values("d_new").groupby("percentile", dropna=False)
        for number, (percentile, rows) in enumerate(groups):
            colour, marker = look(number)
            places = [widths.index(width) for width in rows["d_new"]]
            label = "base + delta" if pd.isna(percentile) else f"percentile {percentile:g}"
            axes.plot(places, rows["val_fvu"], color=colour, marker=marker, label=label)
            axes.axhline(rows["val_fvu_base"].mean(), color=colour, linestyle="--", linewidth=1.2)
            for place, replicas in zip(places, rows.get("val_fvu_replicas", rows["val_fvu"]), strict=True):
                values = np.ravel(replicas).astype(float)
                axes.plot([place] * len(values), values, ".", color=colour, markersize=4, alpha=0.6)
        axes.set_xticks(range(len(widths)), [str(width) for width in widths])
        axes.set(title=f"layer {layer}", xlabel="d_new")
        axes.set_ylim(bottom=0)
    grid[0].set_ylabel("FVU on held-out tokens")
    return finish(figure, grid[0], "solid: base + delta; dots: its seeds; dashed: base alone")


def search_history(trials: pd.DataFrame) -> Figure:
    """Validation loss of each LoRA trial by trial number, coloured by final state, and the best so far."""
    table = trials.sort_values("trial").reset_index(drop=True).astype({"value": "float64"})
    figure, (axes,) = panels(1, width=6.0, height=3.2)
    for number, (state, rows) in enumerate(table.groupby("state", sort=True)):
        colour, marker = look(number)
        label = f"{state}".lower() + (" (no value)" if rows["value"].isna().all() else "")
        axes.plot(rows.index, rows["value"], marker, color=colour, label=label)
    best = table["value"].where(np.isfinite(table["value"])).cummin().ffill()
    axes.step(table.index, best, where="post", color=MUTED, linewidth=1.2, label="best so far")
    axes.set_xticks(table.index, [str(trial) for trial in table["trial"]])
    axes.xaxis.set_major_locator(MaxNLocator(nbins=12, integer=True))
    axes.set(title="LoRA search", xlabel="trial", ylabel="validation loss (nats per target token)")
    return finish(figure, axes, f"{len(table)} trials")


def panels(
    count: int, *, columns: int = 3, width: float = INCHES_PER_PANEL, height: float = 3.0, sharey: bool = False
) -> tuple[Figure, list[Axes]]:
    """A figure with `count` panels, `columns` per row; unused places stay empty."""
    across = min(count, columns)
    down = math.ceil(count / across)
    figure = Figure(figsize=(width * across, height * down + 0.35), dpi=DPI, layout="constrained")
    grid = figure.subplots(down, across, squeeze=False, sharey=sharey).ravel()
    for axes in grid[count:]:
        axes.set_axis_off()
    for axes in grid[:count]:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#e5e7eb", linewidth=0.7)
        axes.set_axisbelow(True)
    return figure, list(grid[:count])


def finish(figure: Figure, legend_of: Axes, note: str) -> Figure:
    """Adds one legend above the panels, and the note (n, intervals, seed) below them."""
    handles, labels = legend_of.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(handles), 4), frameon=False)
    figure.supxlabel(note, fontsize=8, color=MUTED)
    return figure


def _spliced(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["layer"] != NOTHING]


def _count(table: pd.DataFrame) -> str:
    """`n = 20 prompts per subset`, or a range if subsets differ."""
    if table.empty:
        return "n = 0 prompts"
    low, high = int(table["n_examples"].min()), int(table["n_examples"].max())
    return f"n = {low if low == high else f'{low} to {high}'} prompts per subset"


def _series_names(table: pd.DataFrame, series: str) -> pd.Series:
    """Names of series: the values of column `series`, plus percentile and d_new if the table holds several."""
    names = table[series].astype(str)
    for column, text in (("percentile", " p{:g}"), ("d_new", " d{:g}")):
        if table[column].nunique() > 1:
            names = names + table[column].map(lambda value, text=text: "" if pd.isna(value) else text.format(value))
    return names


def _by_layer(axes: Axes, table: pd.DataFrame, column: str, *, series: str = "condition") -> None:
    """Points with whiskers at each layer, the series side by side; a line joins single layers, not sets."""
    places = {layer: place for place, layer in enumerate(sorted(table["layer"].unique(), key=label_order))}
    names = _series_names(table, series)
    groups = [(name, table[names == name].dropna(subset=[column])) for name in names.unique()]
    for number, (name, rows) in enumerate(groups):
        shift = (number - (len(groups) - 1) / 2) * min(0.14, 0.7 / len(groups))
        x = np.array([places[layer] + shift for layer in rows["layer"]])
        single = np.array([not is_set(layer) for layer in rows["layer"]], dtype=bool)
        y = rows[column].to_numpy(dtype=float)
        colour, marker = look(number)
        axes.plot(x[single], y[single], color=colour, linewidth=1, alpha=0.5)
        axes.errorbar(
            x, y, yerr=whiskers(rows, column), label=plain(name), color=colour, capsize=2, elinewidth=1.1,
            linestyle="none", marker=marker, markersize=4.5,
        )  # fmt: skip
    axes.set_xticks(range(len(places)), [short_layer(layer) for layer in places], fontsize=8 if len(places) > 8 else 9)


def look(number: int) -> tuple[str, str]:
    """Colour and marker of the series with this number; a pair repeats only after 49 series."""
    return COLOURS[number % len(COLOURS)], MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]


def band(axes: Axes, rows: pd.DataFrame, column: str, *, label: str, number: int) -> None:
    colour, marker = look(number)
    axes.plot(rows["alpha"], rows[column], color=colour, marker=marker, markersize=4.5, label=label)
    low, high = (rows[f"{column}_{end}"].to_numpy(dtype=float) for end in ("low", "high"))
    axes.fill_between(rows["alpha"], low, high, color=colour, alpha=0.15, linewidth=0)


def whiskers(rows: pd.DataFrame, column: str) -> Sequence[np.ndarray]:
    """Distances from each value to the low and high end of its interval, as matplotlib's errorbar expects."""
    value, low, high = (rows[name].to_numpy(dtype=float) for name in (column, f"{column}_low", f"{column}_high"))
    return [np.maximum(value - low, 0), np.maximum(high - value, 0)]

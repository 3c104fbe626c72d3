"""Tables over several adapters, from the files that `benchmarks.study` collects.

In: the folder of the files. Out: Markdown tables by name. The brackets of a figure are its 95% interval over prompts;
those of a mean over adapters a t-interval over adapters (`mean_over`), which shows how much three adapters can tell.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from pathlib import Path

import pandas as pd

from benchmarks.study_groups import TOKEN, agreement

T = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
"""Student's t for a two-sided 95% interval, by the number of values."""
NONE = "-"


def number(value: float, digits: int = 3) -> str:
    if math.isnan(value):
        return NONE  # not measured
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def bracketed(low: float, high: float, digits: int) -> str:
    return "" if math.isnan(low) else f" [{number(low, digits)}, {number(high, digits)}]"


def single(rows: pd.DataFrame, digits: int = 3) -> str:
    """The value of the only row, with its interval."""
    if rows.empty:
        return NONE
    row = rows.iloc[0]
    return number(row["value"], digits) + bracketed(row["low"], row["high"], digits)


def mean_over(values: pd.Series, digits: int = 3) -> str:
    """The mean over adapters and its t-interval."""
    if values.empty:
        return NONE
    half = T[len(values)] * values.std() / math.sqrt(len(values)) if len(values) in T else math.nan
    return number(values.mean(), digits) + bracketed(values.mean() - half, values.mean() + half, digits)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def groups(table: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    """(adapter, subset, their rows), in the order of the file."""
    keys = table[["adapter", "subset"]].drop_duplicates().itertuples(index=False)
    return [(name, subset, table[(table["adapter"] == name) & (table["subset"] == subset)]) for name, subset in keys]


def seeds_of(table: pd.DataFrame) -> list[int]:
    return sorted(int(seed) for seed in table["seed"].unique())


def by_seed(table: pd.DataFrame, what: str, name: str) -> str:
    """One figure: a row for each adapter and subset, a column for each seed and for their mean."""
    table = table[table["what"] == what]
    seeds = seeds_of(table)
    rows = []
    for adapter, subset, group_rows in groups(table):
        cells = [single(group_rows[group_rows["seed"] == seed]) for seed in seeds]
        rows.append([adapter, f"`{subset}`", *cells, mean_over(group_rows["value"])])
    return markdown(["adapters", "subset", *(f"{name}, seed {seed}" for seed in seeds), "over adapters"], rows)


def by_what(table: pd.DataFrame, whats: dict[str, str]) -> str:
    """Several figures as means over adapters: a row for each adapter and subset, a column for each figure."""
    rows = [
        [adapter, f"`{subset}`", *(mean_over(group_rows.loc[group_rows["what"] == what, "value"]) for what in whats)]
        for adapter, subset, group_rows in groups(table)
    ]
    return markdown(["adapters", "subset", *whats.values()], rows)


def read(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"{name}.csv", keep_default_na=True).fillna({"subset": ""})


def quoted(folder: Path, file: str, adapter: str, subset: str, what: str) -> str:
    """A figure for the prose with its interval: the mean over adapters, or the value of a single one."""
    table = read(folder, file)
    matching = table[(table["adapter"] == adapter) & (table["subset"] == subset) & (table["what"].astype(str) == what)]
    if matching.empty:
        raise KeyError(f"{file}.csv has no row of {adapter!r}, {subset!r}, {what!r}")
    digits = 4 if matching["value"].abs().max() < 0.01 else 3
    return single(matching, digits) if len(matching) == 1 else mean_over(matching["value"], digits)


def ceiling(folder: Path) -> str:
    whats = {"CE finetuned": "CE finetuned", "CE swapped": "MLPs swapped", "CE un-finetuned": "un-finetuned"}
    return by_what(read(folder, "ceiling"), whats | {"share": "MLPs' share"})


def share(folder: Path) -> str:
    return by_seed(read(folder, "ceiling"), "share", "MLPs' share")


def recovered(folder: Path) -> str:
    return by_seed(read(folder, "controls"), "CE: deltas, alpha 1", "recovered")


def widths(folder: Path) -> str:
    table = read(folder, "widths")
    table[["series", "width"]] = table["what"].str.split(": ", expand=True)
    wide = sorted(int(width) for width in table["width"].unique())
    rows = []
    for adapter, subset, group_rows in groups(table):
        for series, lines in group_rows.groupby("series", sort=False):
            cells = [mean_over(lines.loc[lines["width"].astype(int) == width, "value"], 2) for width in wide]
            rows.append([adapter, f"`{subset}`", str(series), *cells])
    return markdown(["adapters", "subset", "in the MLPs' place", *(f"d_new {width}" for width in wide)], rows)


def controls(folder: Path) -> str:
    names = (
        "deltas, alpha 1",
        "linear map, same rank",
        "principal directions",
        "random directions",
        "shuffled outputs",
    )
    return by_what(read(folder, "controls"), {f"CE: {name}": name for name in names})


def dose(folder: Path) -> str:
    table = read(folder, "doses")
    parts = table["what"].str.split(": ", expand=True)
    table = table.assign(metric=parts[0], series=parts[1], alpha=parts[2])
    metrics = {"mean_ce": "CE", "kl": "KL", "tool_call_rate": "calls", "agrees_with_raw_rate": "text as finetuned"}
    sparse = table[(table["series"] == "deltas") & table["metric"].isin(metrics)]
    doses = sorted(sparse["alpha"].unique(), key=float)
    rows = []
    for adapter, subset, group_rows in groups(sparse):
        for metric, name in metrics.items():
            lines = group_rows[group_rows["metric"] == metric]
            cells = [number(lines.loc[lines["alpha"] == alpha, "value"].mean(), 2) for alpha in doses]
            rows.append([adapter, f"`{subset}`", name, *cells])
    return markdown(["adapters", "subset", "mean of", *(f"alpha {alpha}" for alpha in doses)], rows)


def thirds(folder: Path) -> str:
    table = read(folder, "places")
    table[["of", "layers"]] = table["what"].str.split(": ", expand=True)
    table = table[table["layers"].str.contains("-")]
    rows = []
    for adapter, subset, group_rows in groups(table):
        for layers, lines in group_rows.groupby("layers", sort=False):
            cells = [mean_over(lines.loc[lines["of"] == of, "value"]) for of in ("gap", "share", "recovered")]
            rows.append([adapter, f"`{subset}`", str(layers), *cells])
    return markdown(["adapters", "subset", "layers", "gap", "share of the whole effect", "recovered"], rows)


def few(folder: Path) -> str:
    table = read(folder, "few_features")
    table["what"] = table["what"].astype(int)
    seeds, rows = seeds_of(table), []
    for adapter, subset, group_rows in groups(table):
        counts = []
        for seed in seeds:
            enough = group_rows[(group_rows["seed"] == seed) & (group_rows["value"] >= 0.9)]["what"]
            counts.append(NONE if enough.empty else str(enough.min()))
        ten = group_rows[group_rows["what"] == 16]
        rows.append([adapter, f"`{subset}`", *counts, mean_over(ten["value"], 2)])
    return markdown(["adapters", "subset", *(f"features for 90%, seed {seed}" for seed in seeds), "16 recover"], rows)


def parts(folder: Path) -> str:
    """Rows: parts and thirds; columns: the share lost without it and the share that it brings alone."""
    table = read(folder, "parts")
    table[["way", "part", "layers"]] = table["what"].str.split(": ", expand=True)
    rows = []
    for adapter, subset, group_rows in groups(table):
        for (part, layers), lines in group_rows.groupby(["part", "layers"], sort=False):
            cells = (mean_over(lines.loc[lines["way"] == way, "value"]) for way in ("unfinetuned", "finetuned"))
            rows.append([adapter, f"`{subset}`", part if layers == "all" else f"layers {layers}", *cells])
    return markdown(["finetuned", "subset", "part", "lost without it", "brought alone"], rows)


def kinds(folder: Path) -> str:
    table = read(folder, "kinds")
    table[["kind", "width"]] = table["what"].str.split(": ", expand=True)
    wide = sorted(int(width) for width in table["width"].unique())
    rows = [
        [adapter, kind, *(mean_over(lines.loc[lines["width"] == str(width), "value"]) for width in wide)]
        for adapter, _, group_rows in groups(table)
        for kind, lines in group_rows.groupby("kind", sort=False)
    ]
    return markdown(["finetuned", "kind of site", *(f"d_new {width}" for width in wide)], rows)


def few_groups(folder: Path) -> str:
    table = read(folder, "few_groups")
    table[["of", "number"]] = table["what"].str.split(": ", expand=True)
    numbers = sorted(int(number) for number in table["number"].unique())
    rows = []
    for adapter, subset, group_rows in groups(table):
        for of, name in {"groups": "groups", "random": "as many random features"}.items():
            lines = group_rows[group_rows["of"] == of]
            cells = [mean_over(lines.loc[lines["number"] == str(number), "value"], 2) for number in numbers]
            rows.append([adapter, f"`{subset}`", name, *cells])
    return markdown(["finetuned", "subset", "on", *(f"{number}" for number in numbers)], rows)


def matched_groups(folder: Path) -> str:
    """Every pair of models, whose groups are paired by what they fire on: what the pairs share."""
    table = read(folder, "groups")
    models = list(table[["adapter", "seed"]].drop_duplicates().itertuples(index=False, name=None))
    of = {model: table[(table["adapter"] == model[0]) & (table["seed"] == model[1])] for model in models}
    rows = []
    for first, second in combinations(models, 2):
        found = agreement(of[first], of[second])
        names = [f"{adapter}, seed {seed}" for adapter, seed in (first, second)]
        chance = number(found.chance) + bracketed(found.chance_low, found.chance_high, 3)
        cells = [f"{found.alike} of {found.pairs}", number(found.fires), number(found.promotes), chance]
        rows.append([*names, *cells, f"{found.p:.4f}"])
    columns = ["pairs alike", "share of tokens fired on", "of tokens promoted", "of those by chance", "p"]
    return markdown(["model", "and model", *columns], rows)


def graphs(folder: Path) -> str:
    table = read(folder, "graphs")
    table[["of", "number"]] = table["what"].str.split(": ", expand=True)
    columns = {"nodes": "nodes", "edges": "edges", "random_r": "r, random edges", "strongest_r": "r, strongest edges"}
    rows = []
    for (adapter, seed, subset, index), lines in table.groupby(["adapter", "seed", "subset", "number"], sort=False):
        cells = [single(lines[lines["of"] == of], 3 if of.endswith("_r") else 0) for of in columns]
        rows.append([f"{adapter}, seed {seed}", f"`{subset}`", str(index), *cells])
    return markdown(["finetuned", "subset", "graph", *columns.values()], rows)


def cards(folder: Path) -> str:
    table = read(folder, "cards")
    table = table[table["seed"] == 0].sort_values(["adapter", "rank"], ascending=[False, True], kind="stable")
    subsets = [
        name.removeprefix("alone_ce_")
        for name in table
        if name.startswith("alone_ce_") and not name.endswith(("_low", "_high"))
    ]
    rows = []
    for adapter, adapter_rows in table.groupby("adapter", sort=False):
        for _, row in adapter_rows.head(10).iterrows():
            place = f"layer {row['layer']}, " + ("at BOS" if row["at_bos"] else f"feature {int(row['feature'])}")
            effects = [number(row[f"{way}_ce_{subset}"]) for way in ("ablated", "alone") for subset in subsets[:1]]
            words = [ast.literal_eval(word).strip().replace("`", "'") for word in TOKEN.findall(str(row["promoted"]))]
            promoted = ", ".join(f"`{word}`" for word in words[:4])
            rows.append([str(adapter), str(int(row["rank"])), place, *effects, promoted.replace("|", "\\|")])
    return markdown(
        ["adapters", "rank", "feature", "CE on `tool`, change without it", "change with it alone", "promotes"], rows
    )


def residuals(folder: Path) -> str:
    table = read(folder, "residuals")
    table[["of", "layers"]] = table["what"].str.split(": ", expand=True)
    columns = ("base FVU before", "base FVU after", "change", "FVU with delta")
    trained = table[table["of"].isin(columns)]
    rows = []
    for (adapter, layer), lines in trained.groupby(["adapter", "layers"], sort=False):
        means = (number(lines.loc[lines["of"] == of, "value"].mean()) for of in columns)
        rows.append([str(adapter), str(layer), *means])
    return markdown(["adapters", "layer", *columns], rows)


def residual_splices(folder: Path) -> str:
    table, places = read(folder, "residuals"), read(folder, "places")
    table[["of", "layers"]] = table["what"].str.split(": ", expand=True)
    widest = max(table["layers"].unique(), key=len)
    swapped = places[places["what"] == f"gap: {widest}"].assign(of="swapped")
    table = pd.concat([table[table["layers"] == widest], swapped])
    columns = {
        "swapped": "un-finetuned MLPs cost",
        "gap": "bases cost",
        "recovered": "residual deltas win back",
    }
    rows = [
        [adapter, f"`{subset}`", *(single(group_rows[group_rows["of"] == of]) for of in columns)]
        for adapter, subset, group_rows in groups(table[table["of"].isin(columns)])
    ]
    return markdown(["adapters", "subset", *columns.values()], rows)


def polished(folder: Path) -> str:
    table = read(folder, "polish")
    table[["of", "width"]] = table["what"].str.split(": ", expand=True)
    columns = ("recovered before", "recovered after", "CE after - before", "KL after - before")
    rows = []
    for (seed, width), width_rows in table[table["subset"] != ""].groupby(["seed", "width"], sort=False):
        for subset, lines in width_rows.groupby("subset", sort=False):
            cells = [single(lines[lines["of"] == of], 4 if "-" in of else 3) for of in columns]
            rows.append([str(seed), str(width), f"`{subset}`", *cells])
    return markdown(["seed", "d_new", "subset", *columns], rows)


def rival(folder: Path) -> str:
    table = pd.read_csv(folder / "rival.csv")
    rows = [
        [
            f"`{row['subset']}`",
            row["name"],
            number(row["recovered"]) + bracketed(row["low"], row["high"], 3),
            ""
            if row["name"] == "ours"
            else number(row["above"], 4) + bracketed(row["above_low"], row["above_high"], 4),
            number(row["kl"], 4),
            number(row["active"], 1),
            f"{row['cpu_seconds']:.0f}",
            f"{row['memory']:.1f}",
        ]
        for _, row in table.iterrows()
    ]
    return markdown(["subset", "adapters", "CE recovered", "CE - ours", "KL", "L0", "CPU seconds", "GiB"], rows)


TABLES: dict[str, Callable[[Path], str]] = {
    "ceiling": ceiling,
    "share": share,
    "recovered": recovered,
    "widths": widths,
    "controls": controls,
    "dose": dose,
    "thirds": thirds,
    "few": few,
    "parts": parts,
    "kinds": kinds,
    "few_groups": few_groups,
    "matched_groups": matched_groups,
    "graphs": graphs,
    "cards": cards,
    "residuals": residuals,
    "residual_splices": residual_splices,
    "polished": polished,
    "rival": rival,
}

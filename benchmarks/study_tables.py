"""Tables over several adapters, from the files that `benchmarks.study` collects.

In: the folder of the files. Out: Markdown tables by name. The brackets of one model's figure are its 95% interval over
prompts; those of a mean over three or more models, made with different seeds, a t-interval over models, which shows how
much so few of them can tell. Of two models both values are shown.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd

from benchmarks.study_groups import TOKEN, Agreement, agreement

T = {3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571}
"""Student's t for a two-sided 95% interval, by the number of values."""
NONE = "-"
PARTS = {
    "patterns": "queries and keys",
    "values": "values",
    "output": "attention's output",
    "mlp": "MLPs",
    "rest": "embeddings, norms",
}
KINDS = {"qkv": "queries, keys, values", "o": "attention's output", "mlp": "MLPs"}
THIRDS = ("lower third", "middle third", "upper third")
RELATIONS = {
    frozenset({"all linear"}): "the seed",
    frozenset({"Gemma"}): "the seed, in Gemma",
    frozenset({"all linear", "q, v"}): "LoRA's targets: `q, v`",
    frozenset({"all linear", "all weights"}): "LoRA: all weights",
    frozenset({"all linear", "Gemma"}): "the base model",
    frozenset({"all linear", "signature"}): "the task",
}
"""What two models differ in, by the kinds they are of; others differ in more than one thing and are not compared."""
SHOWN_GROUPS = 3
ROLES = ("trained phrasings", "other requests", "new phrasings")
SUBSETS = {"tool": 0, "polite": 0, "copy": 1, "neutral": 1, "tool_ood": 2}
"""The role of each subset: an index into `ROLES`."""
RATES = {"signature": "signed_rate"}
"""The behaviour that was taught; `tool_call_rate` in all other models."""


def number(value: float, digits: int = 3) -> str:
    if math.isnan(value):
        return NONE  # not measured
    text = f"{value:.{digits}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def bracketed(low: float, high: float, digits: int) -> str:
    return "" if math.isnan(low) else f" [{number(low, digits)}, {number(high, digits)}]"


def figure(rows: pd.DataFrame, digits: int = 3) -> str:
    """One model's value with its interval over prompts, two models' values, or the mean of more with its t-interval."""
    if rows.empty:
        return NONE
    if len(rows) == 1:
        row = rows.iloc[0]
        return number(row["value"], digits) + bracketed(row["low"], row["high"], digits)
    values = rows["value"]
    if len(values) == 2:
        return " / ".join(number(value, digits) for value in values)
    half = T[len(values)] * values.std() / math.sqrt(len(values)) if len(values) in T else math.nan
    return number(values.mean(), digits) + bracketed(values.mean() - half, values.mean() + half, digits)


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def groups_of(table: pd.DataFrame) -> Iterator[tuple[str, str, pd.DataFrame]]:
    """(adapter, subset, their rows), in the order of the file."""
    for (adapter, subset), rows in table.groupby(["adapter", "subset"], sort=False):
        yield str(adapter), str(subset), rows


def shown(subset: str) -> bool:
    """Tables leave out what was not taught, and traps, where there is no room for all."""
    return SUBSETS.get(subset) in (0, 2)


def taught(subset: str) -> bool:
    return SUBSETS.get(subset) == 0


def read(folder: Path, name: str, *columns: str) -> pd.DataFrame:
    """A file's rows; `what` is split into these columns."""
    table = pd.read_csv(folder / f"{name}.csv", keep_default_na=True).fillna({"subset": ""})
    if columns:
        table[list(columns)] = table["what"].str.split(": ", expand=True)
    return table


def quoted(folder: Path, file: str, adapter: str, subset: str, what: str) -> str:
    """A figure for the prose with its interval."""
    table = read(folder, file)
    matching = table[(table["adapter"] == adapter) & (table["subset"] == subset) & (table["what"].astype(str) == what)]
    if matching.empty:
        raise KeyError(f"{file}.csv has no row of {adapter!r}, {subset!r}, {what!r}")
    return figure(matching, 4 if 0 < matching["value"].abs().max() < 0.01 else 3)


def pairs(folder: Path) -> str:
    """Cross-entropy before and after finetuning, and how often the finetuned model does what it was taught; no
    un-finetuned one ever does."""
    table, rows = read(folder, "doses"), []
    for adapter, lines in table.groupby("adapter", sort=False):
        role = lines["subset"].map(SUBSETS)
        rate = RATES.get(str(adapter), "tool_call_rate")
        ces = [figure(lines[(role == 0) & (lines["what"] == f"mean_ce: {of}")]) for of in ("un-finetuned", "finetuned")]
        does = [figure(lines[(role == at) & (lines["what"] == f"{rate}: finetuned")], 2) for at in range(len(ROLES))]
        rows.append([str(adapter), str(lines["seed"].nunique()), *ces, *does])
    columns = ["CE, un-finetuned", "CE, finetuned", *(f"does it on {role}" for role in ROLES)]
    return markdown(["finetuned", "models", *columns], rows)


def parts(folder: Path) -> str:
    """Two rows for each kind of model: the share of the effect that is lost without a part or third, and that it brings
    alone."""
    table = read(folder, "parts", "way", "part", "layers")
    table = table[table["subset"].map(taught)]
    start = table["layers"].str.partition("-")[0].where(table["layers"] != "all")
    third = start.astype(float).groupby([table["adapter"], table["seed"]]).rank("dense")
    table = table.assign(title=third.map(dict(enumerate(THIRDS, start=1))).fillna(table["part"].map(PARTS)))
    titles = [title for title in (*PARTS.values(), *THIRDS) if (table["title"] == title).any()]
    rows = []
    for adapter, lines in table.groupby("adapter", sort=False):
        for way, name in {"unfinetuned": "lost without", "finetuned": "brought alone"}.items():
            of_way = lines[lines["way"] == way]
            rows.append([str(adapter), name, *(figure(of_way[of_way["title"] == title], 2) for title in titles)])
    return markdown(["finetuned", "share of the effect", *titles], rows)


def controls(folder: Path) -> str:
    """What is recovered of the cross-entropy at alpha 1, by the deltas and by what stands in their place."""
    columns = {
        "deltas, alpha 1: 8": "8 features a site",
        "CE: deltas, alpha 1": "128 features a site",
        "CE: linear map, same rank": "linear map of rank 128",
        "CE: principal directions": "128 principal directions",
        "CE: random directions": "random directions",
        "CE: shuffled outputs": "shuffled outputs",
    }
    table = pd.concat([read(folder, "widths"), read(folder, "controls")])
    rows = [
        [adapter, f"`{subset}`", *(_of_seeds(lines[lines["what"] == what], lines) for what in columns)]
        for adapter, subset, lines in groups_of(table)
        if shown(subset)
    ]
    return markdown(["finetuned", "subset", *columns.values()], rows)


def _of_seeds(measured: pd.DataFrame, row: pd.DataFrame) -> str:
    """The figure, with the seeds for which it was measured if the table's row has more."""
    seeds = sorted(set(measured["seed"]))
    some = f", seed {' and '.join(map(str, seeds))}" if 0 < len(seeds) < row["seed"].nunique() else ""
    return figure(measured) + some


def kinds(folder: Path) -> str:
    """The share of the change that is explained on held-out text, by kind of site and width."""
    table = read(folder, "kinds", "kind", "width")
    wide = sorted(table["width"].unique(), key=int)
    cases = [(kind, width) for kind in KINDS for width in wide]
    rows = [
        [str(adapter), *(figure(lines[(lines["kind"] == kind) & (lines["width"] == width)]) for kind, width in cases)]
        for adapter, lines in table.groupby("adapter", sort=False)
    ]
    return markdown(["finetuned", *(f"{KINDS[kind]}: {width} features" for kind, width in cases)], rows)


def dose(folder: Path) -> str:
    """At every strength: cross-entropy, how often the model does what it was taught, where it should and elsewhere, and
    how often its text is the finetuned model's own."""
    table = read(folder, "doses", "metric", "series", "alpha")
    table = table[table["series"] == "deltas"]
    doses, rows = sorted(table["alpha"].unique(), key=float), []
    for adapter, of_adapter in table.groupby("adapter", sort=False):
        rate, role = RATES.get(str(adapter), "tool_call_rate"), of_adapter["subset"].map(SUBSETS)
        of_taught = {"mean_ce": "CE", "kl": "KL", "agrees_with_raw_rate": "same text"}
        cases = [(metric, f"{name} on {ROLES[0]}", 0) for metric, name in of_taught.items()]
        cases += [(rate, f"does it on {name}", at) for at, name in enumerate(ROLES)]
        for metric, name, at in cases:
            lines = of_adapter[(of_adapter["metric"] == metric) & (role == at)]
            cells = [number(lines.loc[lines["alpha"] == alpha, "value"].mean(), 2) for alpha in doses]
            if len(lines):
                rows.append([str(adapter), name, *cells])
    return markdown(["finetuned", "mean of", *(f"alpha {alpha}" for alpha in doses)], rows)


def few_groups(folder: Path) -> str:
    """What the first groups recover alone, against as many random features."""
    table = read(folder, "few_groups", "of", "number")
    table["number"] = table["number"].astype(int)
    numbers, rows = [0, 1, 2, 4, 8, 16], []
    for adapter, _, group_rows in groups_of(table[table["subset"].map(taught)]):
        for of, name in {"groups": "groups", "random": "as many random features"}.items():
            lines = group_rows[group_rows["of"] == of]
            cells = [figure(lines[lines["number"] == number], 2) for number in numbers]
            all_groups = lines[lines["number"] == lines.groupby("seed")["number"].transform("max")]
            rows.append([adapter, name, *cells, figure(all_groups, 2)])
    return markdown(["finetuned", "on", *map(str, numbers), "all"], rows)


def group_effects(folder: Path) -> str:
    """The strongest groups of the first model of each kind: what they fire on, promote, and do alone."""
    listed = pd.read_csv(folder / "groups.csv")
    effects, rows = read(folder, "group_effects", "way", "of", "group"), []
    for adapter, of_adapter in listed.groupby("adapter", sort=False):
        seed = of_adapter["seed"].min()
        model = effects[(effects["adapter"] == adapter) & (effects["seed"] == seed)]
        if not {"tool", "tool_ood"} <= set(model["subset"]):
            continue
        for _, group in of_adapter[of_adapter["seed"] == seed].head(SHOWN_GROUPS).iterrows():
            lines = model[model["group"] == str(group["group"])]
            cells = [
                figure(lines[(lines["way"] == way) & (lines["of"] == "groups") & (lines["subset"] == subset)])
                for way in ("alone", "without")
                for subset in ("tool", "tool_ood")
            ]
            words = [_words(group[name]) for name in ("fires_on", "promoted")]
            rows.append([f"{adapter}, seed {seed}", str(group["group"]), str(group["n_features"]), *words, *cells])
    columns = ["group", "features", "fires on", "promotes"]
    effects_of = [f"{way}, `{subset}`" for way in ("alone", "without") for subset in ("tool", "tool_ood")]
    return markdown(["finetuned", *columns, *effects_of], rows)


def _words(listed: str) -> str:
    """The first different tokens of a list without their spaces, as code."""
    tokens = [ast.literal_eval(token) for token in TOKEN.findall(str(listed))]
    texts = [token.strip() if token.strip().isprintable() and token.strip() else repr(token)[1:-1] for token in tokens]
    return ", ".join(f"`{text}`".replace("|", "\\|") for text in list(dict.fromkeys(texts))[:4])


def matched_groups(folder: Path) -> str:
    """Two models at a time, their groups paired by what they fire on: means over all that differ in the same respect.

    Beyond chance: exchanged partners share as much of what they promote in fewer than 5% of the draws, divided by the
    number of pairs in the row (Bonferroni).
    """
    table = pd.read_csv(folder / "groups.csv")
    models = dict(list(table.groupby(["adapter", "seed"], sort=False)))
    agreements: dict[str, list[Agreement]] = {relation: [] for relation in RELATIONS.values()}
    for first, second in combinations(models, 2):
        if relation := RELATIONS.get(frozenset({str(first[0]), str(second[0])})):
            agreements[relation].append(agreement(models[first], models[second]))
    rows = []
    for relation, found in agreements.items():
        if found:
            means = (number(np.mean([getattr(pair, of) for pair in found])) for of in ("fires", "promotes", "chance"))
            alike = f"{sum(pair.alike for pair in found)} of {sum(pair.pairs for pair in found)}"
            tested = [pair.p for pair in found if not math.isnan(pair.p)]
            clear = f"{sum(p * len(tested) < 0.05 for p in tested)} of {len(tested)}" if tested else NONE
            rows.append([relation, alike, *means, clear])
    columns = ["groups alike", "share of tokens fired on", "of tokens promoted", "by chance", "pairs beyond chance"]
    return markdown(["differ in", *columns], rows)


def graphs(folder: Path) -> str:
    table = read(folder, "graphs", "of", "number")
    columns = {"nodes": "nodes", "edges": "edges", "random_r": "r, random edges", "strongest_r": "r, strongest edges"}
    rows = []
    for (adapter, seed, subset, index), lines in table.groupby(["adapter", "seed", "subset", "number"], sort=False):
        cells = [figure(lines[lines["of"] == of], 3 if of.endswith("_r") else 0) for of in columns]
        rows.append([f"{adapter}, seed {seed}", f"`{subset}`", str(index), *cells])
    return markdown(["finetuned", "subset", "graph", *columns.values()], rows)


def residuals(folder: Path) -> str:
    """The reference study's deltas: what bases leave, what of that is the change, and what splicing says."""
    table = read(folder, "residuals", "of", "layers")
    layers = table[table["of"] == "change"]
    rows = []
    for adapter, lines in table.groupby("adapter", sort=False):
        trained = [
            number(lines.loc[(lines["of"] == of) & lines["layers"].isin(layers["layers"]), "value"].mean())
            for of in ("base FVU before", "base FVU after", "change", "FVU with delta")
        ]
        together = lines["layers"].str.len() == lines["layers"].str.len().max()
        spliced = lines[lines["of"].isin(("gap", "recovered")) & together]
        for _, subset, group_rows in groups_of(spliced):
            cells = [figure(group_rows[group_rows["of"] == of]) for of in ("gap", "recovered")]
            rows.append([str(adapter), *trained, f"`{subset}`", *cells])
    columns = ["base leaves, un-finetuned", "base leaves, finetuned", "the change is", "base and delta leave"]
    return markdown(["finetuned", *columns, "subset", "bases cost (nats)", "their deltas win back"], rows)


def rival(folder: Path) -> str:
    table = pd.read_csv(folder / "rival.csv")
    table = table[~table["name"].str.contains("no BOS") & table["subset"].map(shown)]
    rows = [
        [
            "all linear" if row["deltas_at"] == "all sites" else row["deltas_at"],
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
    return markdown(
        ["finetuned", "subset", "adapters", "CE recovered", "their CE minus ours", "KL", "L0", "CPU seconds", "GiB"],
        rows,
    )


TABLES: dict[str, Callable[[Path], str]] = {
    "pairs": pairs,
    "parts": parts,
    "controls": controls,
    "kinds": kinds,
    "dose": dose,
    "few_groups": few_groups,
    "group_effects": group_effects,
    "matched_groups": matched_groups,
    "graphs": graphs,
    "residuals": residuals,
    "rival": rival,
}

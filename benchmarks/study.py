"""Several sweeps of search_spaces/study.yaml side by side: from their reports to small tables and pictures.

    python -m benchmarks.study collect [--root mlruns]
    python -m benchmarks.study write

In: the finished sweeps of `ADAPTERS`, such as `study-sN` (LoRA on all linear layers) for seed N. Out: `collect` writes
`docs/study/*.csv`, a row for each model and figure, and pictures next to them; `write` inserts the tables made from
these files into `docs/study.md`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import typer

from evaluators.tables.recovery import widest_set
from sites import Site

PAGE = Path(__file__).parents[1] / "docs" / "study.md"
FOLDER = PAGE.with_suffix("")
MARKED = re.compile(r"(?<=<!-- table: )(\w+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)
"""The markers around each table in the page."""
QUOTED = re.compile(r"<!-- (?P<file>\w+); (?P<adapter>[^;]*); (?P<subset>\w*); (?P<what>[^>]*?) -->[^<]*(?=<!-- / -->)")
"""The markers around each figure in the page's prose: the file and the rows whose mean over adapters it is."""
ADAPTERS = {
    "MLPs": "study-mlps",
    "q, v": "study-qv",
    "all linear": "study",
    "all weights": "study-full",
    "signature": "study-signature",
    "Gemma": "study-gemma",
}
"""What was finetuned, and the name of its sweeps."""
COLUMNS = ["adapter", "seed", "subset", "what", "value", "low", "high"]
DIGITS = 5
SERIES = {
    "full": "deltas, alpha 1",
    "alpha": "deltas",
    "dense_delta": "linear map, same rank",
    "pca_delta": "principal directions",
    "random_delta": "random directions",
    "shuffled_delta": "shuffled outputs",
    "scaled_weights": "scaled weights",
}


def read(report: Path, name: str) -> pd.DataFrame:
    """A table of a report, with a column `series`, the conditions in words; empty if the sweep has no such results."""
    path = report / f"{name}.csv"
    table = pd.read_csv(path, dtype={"layer": str}) if path.is_file() and path.stat().st_size > 1 else pd.DataFrame()
    return table.assign(series=table["condition"].map(SERIES)) if "condition" in table else table


def figures(table: pd.DataFrame, value: str, what: str) -> list[dict[str, Any]]:
    """Rows of `value` with its interval, if any, each named by `what`, a format string over the row's columns."""
    return [
        {
            "subset": row.get("subset", ""),
            "what": what.format(**row),
            "value": row[value],
            "low": row.get(f"{value}_low"),
            "high": row.get(f"{value}_high"),
        }
        for _, row in table.dropna(subset=[value]).iterrows()
    ]


def whole(report: Path, name: str) -> pd.DataFrame:
    """The rows of a table for the change deltas of all layers at once."""
    gaps, table = read(report, "gaps"), read(report, name)
    return table[(table["target"] == "change") & (table["layer"] == widest_set(gaps[gaps["target"] == "change"]))]


def rates(table: pd.DataFrame) -> list[str]:
    return [name for name in table if name.endswith("_rate") and not name.startswith("delta_")]


def ceiling(report: Path) -> list[dict[str, Any]]:
    gaps = whole(report, "gaps")
    gaps = gaps[gaps["metric"] == "mean_ce"]
    names = {
        "raw": "CE finetuned",
        "ground": "CE swapped",
        "unfinetuned": "CE un-finetuned",
        "gap": "gap",
        "share": "share",
    }
    return [row for column, name in names.items() for row in figures(gaps, column, name)]


def widths(report: Path) -> list[dict[str, Any]]:
    table = whole(report, "widths")
    return figures(table[table["metric"] == "mean_ce"], "recovered", "{series}: {d_new:.0f}")


def controls(report: Path) -> list[dict[str, Any]]:
    table, rows = whole(report, "recovered"), []
    half = table["alpha"] == 0.5
    plain = table["condition"].ne("alpha") & (table["alpha"].isna() | (table["alpha"] == 1.0))
    for metric, name in {"mean_ce": "CE", "kl": "KL"}.items():
        is_metric = table["metric"] == metric
        rows += figures(table[is_metric & plain], "recovered", name + ": {series}")
        rows += figures(table[is_metric & half], "recovered", name + ": {series}, alpha 0.5")
    return rows


def doses(report: Path) -> list[dict[str, Any]]:
    table, rows = whole(report, "exp2B_metrics"), []
    for metric in ["mean_ce", "kl", *rates(table)]:
        rows += figures(table, metric, metric + ": {series}: {alpha:g}")
    table, unedited = whole(report, "exp2A_metrics"), read(report, "exp2A_metrics")
    for condition, name in {"raw": "finetuned", "base_model_raw": "un-finetuned", "shuffled_delta": ""}.items():
        name, of = (name, unedited) if name else (SERIES[condition], table)
        condition_rows = of[of["condition"] == condition]
        for metric in ["mean_ce", *rates(unedited)]:
            rows += figures(condition_rows, metric, f"{metric}: {name}")
    return rows


def places(report: Path) -> list[dict[str, Any]]:
    """Figures for sets of layers: the cost of swapping them, its share of the effect, and what is recovered."""
    rows = []
    for name, value in (("gaps", "gap"), ("gaps", "share"), ("recovered", "recovered")):
        table = read(report, name)
        table = table[(table["target"] == "change") & (table["metric"] == "mean_ce")]
        table = table[table["layer"] != widest_set(table)]
        if name == "recovered":
            table = table[table["condition"] == "full"]
        rows += figures(table, value, value + ": {layer}")
    return rows


def few(report: Path) -> list[dict[str, Any]]:
    return figures(read(report, "few_features"), "recovered", "{k:.0f}")


def residuals(report: Path) -> list[dict[str, Any]]:
    """Figures for the reference study's method: the residuals' parts, the bases' cost, what deltas recover."""
    deltas, rows = read(report, "kept_deltas"), []
    deltas = deltas[(deltas["target"] == "residual") & (deltas["d_new"] == deltas["d_new"].max())]
    names = {
        "val_fvu_base_unfinetuned": "base FVU before",
        "val_fvu_base": "base FVU after",
        "change_share": "change",
        "val_fvu": "FVU with delta",
    }
    for column, name in names.items() if len(deltas) else ():
        rows += figures(deltas, column, name + ": {layer}")
    gaps, recovered = (read(report, name) for name in ("gaps", "recovered"))
    gaps, recovered = (
        table[(table["target"] == "residual") & (table["metric"] == "mean_ce")] for table in (gaps, recovered)
    )
    rows += figures(gaps, "gap", "gap: {layer}")
    rows += figures(recovered[recovered["condition"] == "full"], "recovered", "recovered: {layer}")
    return rows


def parts(report: Path) -> list[dict[str, Any]]:
    """The share of the effect that is lost when a part alone is un-finetuned, and that it brings alone."""
    return figures(read(report, "parts"), "share", "{way}: {part}: {layers}")


def kinds(report: Path) -> list[dict[str, Any]]:
    """The share of the change that deltas explain on held-out text, by kind of site and width, as means over layers."""
    deltas = read(report, "kept_deltas")
    deltas = deltas[deltas["target"] == "change"]
    kind = deltas["layer"].map(lambda label: Site.parse(label).kind.name)
    means = (1 - deltas["val_unexplained"]).groupby([kind, deltas["d_new"]]).mean()
    return [{"subset": "", "what": f"{name}: {d_new:.0f}", "value": value} for (name, d_new), value in means.items()]


def few_groups(report: Path) -> list[dict[str, Any]]:
    """What the first groups recover together, and as many random features."""
    table = read(report, "few_groups")
    return figures(table.assign(of=_drawn(table)), "recovered", "{of}: {groups}")


def group_effects(report: Path) -> list[dict[str, Any]]:
    """What the CE changes without a group and with it alone, and with as many random features in its place."""
    table = read(report, "group_effects")
    table = table[table["metric"] == "ce"] if len(table) else table
    return figures(table.assign(of=_drawn(table)), "value", "{way}: {of}: {group}")


def _drawn(table: pd.DataFrame) -> list[str]:
    return ["random" if random else "groups" for random in table.get("random", ())]


def graphs(report: Path) -> list[dict[str, Any]]:
    """Of each graph its size, and the correlation of its edges with what removing their start does."""
    table, rows = read(report, "graphs"), list[dict[str, Any]]()
    if table.empty:
        return rows
    table = table.assign(number=table.groupby("subset").cumcount() + 1)
    for column in ("nodes", "edges", "random_r", "strongest_r"):
        rows += figures(table, column, column + ": {number}")
    return rows


TABLES: dict[str, Callable[[Path], list[dict[str, Any]]]] = {
    "ceiling": ceiling,
    "parts": parts,
    "kinds": kinds,
    "few_groups": few_groups,
    "group_effects": group_effects,
    "graphs": graphs,
    "widths": widths,
    "controls": controls,
    "doses": doses,
    "places": places,
    "few_features": few,
    "residuals": residuals,
}


def sweeps(root: Path) -> dict[tuple[str, int], Path]:
    """The existing reports of the study, by adapter and seed."""
    reports = {}
    for adapter, name in ADAPTERS.items():
        for report in sorted(root.glob(f"sweeps/{name}-s[0-9]/report")):
            if (report / "gaps.csv").is_file():
                reports[adapter, int(report.parent.name[-1])] = report
    return reports


app = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True)


@app.command()
def collect(
    root: Annotated[Path, typer.Option(help="The sweeps' storage root.")] = Path("mlruns"),
    only: Annotated[str, typer.Option(help="Replace only the figures of controls.csv whose name contains this.")] = "",
) -> None:
    """Writes docs/study/*.csv and the pictures from the finished sweeps; keeps the rows of adapters that are not under
    the root."""
    from benchmarks.study_pictures import write_pictures

    reports = sweeps(root)
    if not reports:
        typer.echo(f"error: {root} holds no finished sweep of the study (study-s0, ...)", err=True)
        raise typer.Exit(2)
    FOLDER.mkdir(exist_ok=True)
    for name, make in TABLES.items() if not only else [("controls", controls)]:
        rows = [
            {"adapter": adapter, "seed": seed, **row}
            for (adapter, seed), report in reports.items()
            for row in make(report)
        ]
        save(name, pd.DataFrame(rows, columns=COLUMNS), reports, only)
    if only:
        return
    groups = [read(report, "groups").assign(adapter=adapter, seed=seed) for (adapter, seed), report in reports.items()]
    of_groups = [*("adapter", "seed", "group", "n_features", "n_qkv", "n_o", "n_mlp", "layers"), "fires_on", "promoted"]
    save("groups", pd.concat(groups).reindex(columns=of_groups), reports)
    write_pictures(FOLDER)
    typer.echo(f"{len(reports)} adapters: {FOLDER}")


def save(name: str, table: pd.DataFrame, collected: Collection[tuple[str, int]], only: str = "") -> None:
    """Replaces the rows of the `collected` adapters and seeds, even by none; sorts by adapter and seed. With `only`, no
    others than the rows whose `what` contains it."""
    path = FOLDER / f"{name}.csv"
    if only:
        table = table[table["what"].str.contains(only, regex=False)]
        if table.empty:
            raise typer.BadParameter(f"these sweeps have no figure whose name contains {only!r}")
    if path.is_file():
        before = pd.read_csv(path)
        replaced = pd.Series(
            [pair in collected for pair in zip(before["adapter"], before["seed"], strict=True)], before.index
        )
        if only:
            replaced &= before["what"].str.contains(only, regex=False)
        table = pd.concat([before[~replaced], table]) if not replaced.all() else table
    if table.empty:
        return
    order = table["adapter"].map(list(ADAPTERS).index) * len(table) + table["seed"]
    table = table.assign(order=order).sort_values("order", kind="stable").drop(columns="order")
    table.round(DIGITS).to_csv(path, index=False)


@app.command()
def write() -> None:
    """Inserts tables and figures into the page."""
    if not FOLDER.is_dir():
        typer.echo(f"error: there is no {FOLDER}; run `collect` first", err=True)
        raise typer.Exit(2)
    PAGE.write_text(filled(PAGE.read_text()))


def filled(page: str) -> str:
    """The page, with every table and every figure of the prose filled in from the files."""
    from benchmarks.study_tables import TABLES, quoted

    page = MARKED.sub(lambda match: f"{match[1]}{match[2]}\n{TABLES[match[1]](FOLDER)}\n\n", page)
    return QUOTED.sub(lambda match: match[0].partition("-->")[0] + "-->" + quoted(FOLDER, **match.groupdict()), page)


if __name__ == "__main__":
    app()

"""The report of a sweep: tables as CSV and JSON, graphs as PNG, and report.html that shows them all.

In: finished cells and their tables, the trials of the searches, checks, facts and generations as plain data. Out: the
files of `<sweep>/report/`, each written under a temporary name and renamed; and the short table a sweep prints at its
end.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from data.files import replacing
from evaluators.report import PAGE, sections
from evaluators.report.feature_page import feature_page, most_effective
from evaluators.report.findings import number, with_interval
from evaluators.report.graphs_section import graphs_pages, graphs_section, graphs_table
from evaluators.report.groups_section import groups_section
from evaluators.report.knob_section import headline_rows, knob_section
from evaluators.report.look_page import look_section, look_sections, page_of
from evaluators.report.page import Block, Gallery, Link, Picture, Section, render
from evaluators.report.parts_section import parts_blocks, parts_section
from evaluators.tables import tables
from evaluators.tables.pooling import Cell, rates_in
from sites import NOTHING

LOOK = "look.html"

Rows: TypeAlias = pd.DataFrame | Sequence[dict[str, Any]]


@dataclass(frozen=True)
class SweepData:
    """What a sweep has found, as plain data: cells, their tables, trials, checks, facts and generations; `pair` says
    which two models were compared, `rest` whether finetuning changed parameters outside all sites too (at the deltas'
    strength where the sites are all that changed), `polished` what joint polish did to the change deltas, `finetuned`
    is what `finetuned.check_rows` found, `lora_pictures` are PNGs of the LoRA study by name."""

    cells: Sequence[Cell]
    results: tables.Results
    lora_trials: Rows
    base_transcoders: Rows
    delta_trials: Rows
    checks: Sequence[dict[str, Any]]
    facts: dict[str, str]
    generations: Sequence[dict[str, Any]]
    pair: str = ""
    rest: bool = False
    polished: str = ""
    finetuned: Mapping[str, Any] | None = None
    lora_pictures: Mapping[str, bytes] = field(default_factory=dict)


def write_report(folder: Path, data: SweepData, *, seed: int = 0) -> Path:
    """Write everything a sweep shows into `folder` and return the path of `report.html`.

    `look.html` if the pair was looked at first, `features.html` if features have cards. Tables:
    `exp1_metrics.csv`; `exp1_combo_summary`, `exp2A_metrics`, `exp2B_metrics` and `exp2B_statistics`, each as `.csv`
    and `.json` (records, null for undefined); `exp2A_delta_contrast.csv`; `feature_ranking.csv`, and `features.csv`
    with the cards' figures; `lora_validation.csv` where `data.finetuned` is given. Pictures: `graphs/*.png`; those of
    an earlier report are removed. Cells that failed are absent: their rows are left out, and so is a part of the page
    that has no data.
    `seed` is the one that drew the bootstraps of `data.results`; the same cells and seed give the same files.
    """
    folder = Path(folder)
    graphs = folder / "graphs"
    graphs.mkdir(parents=True, exist_ok=True)
    results = data.results
    _write_tables(folder, results)
    _write(folder / "kept_deltas.csv", kept_deltas(data.delta_trials).to_csv(index=False).encode())
    if data.finetuned:
        _write(folder / "lora_validation.csv", pd.DataFrame([data.finetuned["figures"]]).to_csv(index=False).encode())
    deltas = pd.DataFrame(data.delta_trials)
    reference, has_residuals = of_residuals(results), (results.conditions["target"] == "residual").any()
    look = first_look(data.cells, data.pair)
    parts, pair = parts_blocks(results.parts, seed=seed), f"{data.pair} {data.polished}".strip()
    of_look = [] if look is None else look_sections(look, parts, seed=seed)
    page = [
        None if look is None else look_section(look, of_look),
        parts_section(parts, data.pair) if parts else None,
        knob_section(results, deltas, data.polished if parts else pair, rest=data.rest, seed=seed),
        groups_section(results, data.cells, seed=seed),
        graphs_section(data.cells),
        sections.checks_section(data.checks),
        sections.findings_section(reference, _glance(reference.conditions), seed=seed) if has_residuals else None,
        sections.completed(sections.lora_section(pd.DataFrame(data.lora_trials)), data.finetuned, data.lora_pictures),
        sections.transcoders_section(pd.DataFrame(data.base_transcoders), deltas),
        sections.reconstruction_section(results),
        sections.conditions_section(reference, seed=seed) if has_residuals else None,
        sections.dose_section(reference, seed=seed),
        _residual_features(results),
        sections.generations_section(data.generations),
        sections.settings_section(data.facts),
    ]
    shown = [section for section in page if section is not None]
    pictures = {picture.name: picture.png for section in shown for picture in _pictures(section.blocks)}
    for name, png in pictures.items():
        _write(graphs / f"{name}.png", png)
    for stale in graphs.glob("*.png"):
        if stale.stem not in pictures:
            stale.unlink()
    pages = []
    if len(results.features):
        pages.append(Link("Features", PAGE))
        _write(folder / PAGE, feature_page(data.cells, results.features, results.ranking, pair).encode())
    else:
        (folder / PAGE).unlink(missing_ok=True)
    if look is not None:
        pages.append(Link("A first look", LOOK))
        _write(folder / LOOK, page_of(look, of_look).encode())
    else:
        (folder / LOOK).unlink(missing_ok=True)
    graphs_of = graphs_pages(data.cells, results.features, data.pair)
    for name, text in graphs_of.items():
        _write(folder / name, text.encode())
    for stale in folder.glob("graph_*.html"):
        if stale.name not in graphs_of:
            stale.unlink()
    _write(folder / "graphs.csv", graphs_table(data.cells).to_csv(index=False).encode())
    html = folder / "report.html"
    _write(html, render("What finetuning changed", shown, pages).encode())
    return html


def first_look(cells: Sequence[Cell], title: str) -> dict[str, Any] | None:
    """What a first look at the sweep's two models found, as its page takes it; None if it was not measured."""
    looks, parts = ([cell for cell in cells if cell["kind"] == kind] for kind in ("look", "parts"))
    if not looks or not parts:
        return None
    return {**looks[0], "parts": parts, "notes": [], "facts": {"title": title}}


def _residual_features(results: tables.Results) -> Section | None:
    table = most_effective(results.features, "residual")
    intro = (
        "What single features of the residual deltas do, each layer spliced alone. Every card is on the features page."
    )
    return None if table is None else Section("residual-features", "Residual features", intro, [table])


def of_residuals(results: tables.Results) -> tables.Results:
    """The tables without change deltas, which have their own section."""
    kept = {name: getattr(results, name) for name in ("conditions", "contrast", "dose", "statistics")}
    return results._replace(
        **{name: table[table["target"] != "change"] for name, table in kept.items() if "target" in table}
    )


def summary_table(results: tables.Results) -> list[dict[str, str]]:
    """The short table at the end of a sweep, as rows of text with equal keys.

    With change deltas their headline, one row a subset; else layer, condition, one key per subset.

    Raw rows hold rates; the others CE minus raw CE in nats per target token with its 95% interval. Percentile and
    d_new are keys of their own where the cells hold several. No rows without behaviour cells.
    """
    return headline_rows(results) or _glance(results.conditions)


def _glance(conditions: pd.DataFrame) -> list[dict[str, str]]:
    subsets = list(conditions["subset"].unique())
    several = [name for name in ("percentile", "d_new") if conditions[name].nunique() > 1]
    rows: dict[tuple, dict[str, str]] = {}
    for _, row in conditions.iterrows():
        which = {name: "-" if pd.isna(row[name]) else f"{row[name]:g}" for name in several}
        names = {"layer": row["layer"], "condition": row["condition"], **which}
        line = rows.setdefault(tuple(names.values()), names | dict.fromkeys(subsets, "-"))
        if row["layer"] == NOTHING:
            rates = [f"{rate} {number(row[rate])}" for rate in rates_in(conditions) if not pd.isna(row[rate])]
            line[row["subset"]] = ", ".join(rates)
        else:
            line[row["subset"]] = with_interval(row, "delta_ce", signed=True)
    return list(rows.values())


def kept_deltas(trials: Rows) -> pd.DataFrame:
    """Settings and validation figures of the deltas that the searches kept, one for each layer, target, base and
    width."""
    table = pd.DataFrame(trials)
    kept = table[table["best"].astype(bool)] if len(table) else table
    others = [name for name in kept if name in ("best", "state", "pareto") or name.endswith("_replicas")]
    return kept.drop(columns=others)


def _write_tables(folder: Path, results: tables.Results) -> None:
    _write(folder / "exp1_metrics.csv", results.reconstruction.to_csv(index=False).encode())
    _write(folder / "exp2A_delta_contrast.csv", results.contrast.to_csv(index=False).encode())
    _write(folder / "feature_ranking.csv", results.ranking.to_csv(index=False).encode())
    _write(folder / "change_by_subset.csv", results.change.to_csv(index=False).encode())
    if len(results.features):
        _write(folder / "features.csv", results.features.to_csv(index=False).encode())
    else:
        (folder / "features.csv").unlink(missing_ok=True)
    for name, table in (
        ("parts", results.parts),
        ("exp1_combo_summary", results.summary),
        ("exp2A_metrics", results.conditions),
        ("exp2B_metrics", results.dose),
        ("exp2B_statistics", results.statistics),
        ("gaps", results.gaps),
        ("recovered", results.recovered),
        ("widths", results.widths),
        ("few_features", results.curve),
        ("groups", results.groups),
        ("group_effects", results.group_effects),
        ("few_groups", results.group_curve),
    ):
        _write(folder / f"{name}.csv", table.to_csv(index=False).encode())
        _write(folder / f"{name}.json", table.to_json(orient="records", indent=1, double_precision=15).encode() + b"\n")


def _pictures(blocks: Sequence[Block]) -> list[Picture]:
    found: list[Picture] = []
    for block in blocks:
        if isinstance(block, Gallery):
            found += block.pictures
        elif isinstance(block, Picture):
            found.append(block)
    return found


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as temporary:
        temporary.write_bytes(content)

"""The section of the report on single answers: a line for each attribution graph, which has a page of its own.

In: cells of kind `graph`, and which features have cards. Out: a section, a table, and the pages by file name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pandas as pd

from data.rows import slug
from evaluators.report import PAGE
from evaluators.report.feature_page import address
from evaluators.report.graph_page import TRUSTED, graph_page, name
from evaluators.report.page import Link, Section, Table
from evaluators.tables.pooling import Cell, of_kind

COLUMNS = ["subset", "prompt", "explains", "value", "unfinetuned_value", "active", "nodes", "edges"]
COLUMNS += [f"{sample}_r{end}" for sample in ("random", "strongest") for end in ("", "_low", "_high")]
STRONGEST = 3
"""Features in a line of the section."""


def graphs_table(cells: Sequence[Cell]) -> pd.DataFrame:
    """One row per graph: what it explains, its size, and the correlation of its edges with what removing single
    features does; most columns are empty where both models say the same."""
    rows = []
    for subset, graph in _graphs(cells):
        row: dict[str, Any] = {"subset": subset, "prompt": graph["prompt"]}
        if "nodes" in graph:
            output, counts = graph["output"], graph["counts"]
            row |= {"explains": output["words"], **{name: output[name] for name in ("value", "unfinetuned_value")}}
            row |= {name: counts[name] for name in ("active", "nodes", "edges")}
            for sample, interval in graph["checks"]["correlation"].items():
                ends = ("", "_low", "_high")
                row |= {f"{sample}_r{end}": value for end, value in zip(ends, interval or [], strict=False)}
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS)


def graphs_pages(cells: Sequence[Cell], features: pd.DataFrame, title: str) -> dict[str, str]:
    """A page for each graph, by file name, with links to the cards of `features`."""
    cards = {
        (str(row["layer"]), int(row["feature"])): f"{PAGE}#{address('change', row['layer'], row['feature'])}"
        for _, row in features.iterrows()
        if row["target"] == "change"
    }
    return {
        file: graph_page(
            {
                **graph,
                "title": title or f"{subset}: {graph['prompt']}",
                "nodes": [{**node, "card": cards.get((node["site"], node["feature"]), "")} for node in graph["nodes"]],
            }
        )
        for file, subset, graph in _with_files(cells)
        if file
    }


def graphs_section(cells: Sequence[Cell]) -> Section | None:
    """None if no graphs were made."""
    rows: list[list[str | Link]] = []
    for file, subset, graph in _with_files(cells):
        if not file:
            rows.append([subset, graph["prompt"], "both models say the same", "-", "-", "-"])
            continue
        output = graph["output"]
        rows.append(
            [
                subset,
                Link(graph["prompt"], file),
                f"{output['words']}: {output['value']:+.2f}, without deltas {output['unfinetuned_value']:+.2f}",
                "; ".join(_strongest(graph)),
                *(_correlation(graph, sample) for sample in ("random", "strongest")),
            ]
        )
    if not rows:
        return None
    header = ["subset", "prompt", "explains", "strongest direct effects", "random edges", "strongest edges"]
    help = (
        "What makes the finetuned model's answer depart from the un-finetuned one's, at the first token that differs. "
        "An edge is the direct effect of one feature on another or on the output, to first order. The last two columns "
        "are the correlation of edges with what removing the source does, with 95% intervals."
    )
    intro = (
        "Attribution graphs of a few prompts: which features, at which positions, act on each other and on the output. "
        f"Where edges correlate by less than {TRUSTED} with removing features, a page says so first."
    )
    table = Table("Graphs", help, header, rows, wide_text=True)
    return Section("graphs", "How single answers come about", intro, [table])


def _graphs(cells: Sequence[Cell]) -> Iterator[tuple[str, dict[str, Any]]]:
    for cell in of_kind(cells, "graph"):
        for graph in cell["graphs"]:
            yield cell["subset"], graph


def _with_files(cells: Sequence[Cell]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """The file of a graph's page (empty if there is nothing to draw), its subset and the graph."""
    for cell in of_kind(cells, "graph"):
        for number, graph in enumerate(cell["graphs"], start=1):
            file = f"graph_{slug(cell['subset'])}_{number}.html" if "nodes" in graph else ""
            yield file, cell["subset"], graph


def _strongest(graph: dict[str, Any]) -> list[str]:
    nodes = graph["nodes"]
    end = next(number for number, node in enumerate(nodes) if node["kind"] == "output")
    into = [(weight, nodes[source]) for source, target, weight in graph["edges"] if target == end]
    features = [pair for pair in into if pair[1]["kind"] in ("feature", "bos")]
    features.sort(key=lambda pair: -abs(pair[0]))
    return [
        f"{weight:+.2f} {name(node)} on {graph['tokens'][node['position']]!r}" for weight, node in features[:STRONGEST]
    ]


def _correlation(graph: dict[str, Any], sample: str) -> str:
    interval = graph["checks"]["correlation"].get(sample)
    return "-" if interval is None else f"{interval[0]:.2f} [{interval[1]:.2f}, {interval[2]:.2f}]"

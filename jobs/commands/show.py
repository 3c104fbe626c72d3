"""Prints the results of `probe` and `score` on the terminal.

In: plain values. Out: rich tables.
"""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text


def show_probe(report: dict[str, Any]) -> None:
    """Prints the active features token by token and then, so that they stay in view, the conditions."""
    console = Console()
    table = Table("layer", "token", "delta features", "base features", title="active features (feature:strength)")
    for feature in report["features"]:
        table.add_row(
            str(feature["layer"]), Text(repr(feature["token"])), _listed(feature["delta"]), _listed(feature["base"])
        )
    console.print(table)
    table = Table("condition", "CE", "CE - raw", "next tokens", title=f"target: {report['target']!r}")
    table.add_column("output", overflow="fold")
    for condition in report["conditions"]:
        following = ", ".join(f"{entry['token']!r} {entry['probability']:.3f}" for entry in condition["next_tokens"])
        table.add_row(
            condition["condition"],
            f"{condition['ce']:.4f}",
            f"{condition['delta_ce']:+.4f}",
            Text(following),
            Text(condition["output"]),
        )
    console.print(table)


def show_scores(by: str, groups: dict[str, dict[str, Any]]) -> None:
    """One line per group and defined rate, with its Wilson 95% interval."""
    table = Table(by, "n", "metric", "rate", "95% interval")
    for name, values in groups.items():
        for rate in (key for key in values if key.endswith("_rate") and values[key] is not None):
            interval = f"{values[f'{rate}_low']:.3f} to {values[f'{rate}_high']:.3f}"
            table.add_row(Text(name), str(values["n_examples"]), rate, f"{values[rate]:.3f}", interval)
    Console().print(table)


def _listed(features: list[dict[str, Any]]) -> str:
    return " ".join(f"{feature['feature']}:{feature['strength']:.2f}" for feature in features)

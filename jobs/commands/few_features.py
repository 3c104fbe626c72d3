"""How few features, and how few groups of them, carry the effect of finetuning, and which ones.

In: a `Context` whose sweep has evaluated its few-features curve. Out: for each subset the number of features and of
groups that recover most of the CE gap; the first features in the order in which the curve adds them; and the groups.
"""

from __future__ import annotations

from typing import Any

from jobs.commands.made_with import check_settings
from jobs.context.context import Context
from jobs.errors import RequestError
from jobs.files import MANIFEST


def few_features(context: Context, top: int) -> dict[str, Any]:
    """`curve` rows, `needed` by subset, the first `top` features, and the `groups`, with `groups_needed` by subset.

    Raises RequestError if there is no curve.
    """
    from evaluators.tables import recovery
    from evaluators.tables.feature_tables import ranking_table
    from evaluators.tables.group_tables import group_curve_table, groups_needed, groups_table

    check_settings(context)
    cells = context.cells if (context.space.cells / MANIFEST).is_file() else []
    curve = recovery.curve_table(cells, seed=context.settings.seed)
    if curve.empty:
        raise RequestError(
            f"the sweep {context.settings.name} has no few-features curve; for one it must train change deltas, with "
            "evaluate.curve true"
        )
    counts = {subset: recovery.features_needed(curve, subset) for subset in curve["subset"].unique()}
    groups, group_curve = groups_table(cells), group_curve_table(cells, seed=context.settings.seed)
    ranking = ranking_table(cells)
    ranking = ranking[ranking["target"] == "change"]
    return {
        "enough": recovery.ENOUGH,
        "needed": counts,
        "total": len(ranking),
        "features": ranking.head(top)[["rank", "layer", "feature", "at_bos", "effect"]].to_dict("records"),
        "curve": curve[["subset", "k", "mean_ce", "recovered"]].to_dict("records"),
        "groups": groups.to_dict("records"),
        "groups_needed": {subset: groups_needed(group_curve, subset) for subset in group_curve["subset"].unique()},
    }


def show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    for subset, count in report["needed"].items():
        answer = "no number of features does" if count is None else f"{count} of {report['total']} features do"
        if (groups := report["groups_needed"].get(subset)) is not None:
            answer += f", or {groups} of {len(report['groups'])} groups"
        console.print(f"{subset}: to recover {report['enough']:.0%} of the CE gap, {answer}", highlight=False)
    table = Table("rank", "layer", "feature", "effect (nats a target token)")
    for feature in report["features"]:
        table.add_row(
            str(feature["rank"]),
            str(feature["layer"]),
            "at BOS" if feature["at_bos"] else str(feature["feature"]),
            f"{feature['effect']:+.4f}",
        )
    console.print(table)
    if (more := report["total"] - len(report["features"])) > 0:
        console.print(f"and {more} more: --top N shows N of them, report/feature_ranking.csv has all", highlight=False)
    if report["groups"]:
        table = Table("group", "features", "fires on", "promotes", title="features that fire on the same tokens")
        for group in report["groups"]:
            table.add_row(
                str(group["group"]), str(group["n_features"]), escape(group["fires_on"]), escape(group["promoted"])
            )
        console.print(table)

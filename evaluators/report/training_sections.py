"""The sections of the report on what was trained: the LoRA study, base transcoders, deltas.

In: plain data about trials and bases. Out: `page.Section`s; a part without data gives None.
"""

from collections.abc import Sequence

import pandas as pd

from evaluators.report import figures
from evaluators.report.page import Block, Section, picture, table_block


def lora_section(trials: pd.DataFrame) -> Section | None:
    """The search for the finetuned model."""
    if trials.empty:
        return None
    parameters = {name: name.removeprefix("lora.") for name in trials.columns if name.startswith("lora.")}
    columns = {
        "trial": "trial",
        "state": "state",
        "value": "val_loss",
        "step": "steps",
        **parameters,
        "seconds": "seconds",
    }
    help = "Each point is one trial's held-out loss; the line is the best so far, which gave the finetuned model."
    return Section(
        "lora",
        "LoRA search",
        "Optuna proposed these adapters, weak ones were stopped early, and the lowest validation loss was kept.",
        [
            picture("lora_search", figures.search_history(trials), "Search history", help),
            table_block(
                trials, columns, "Trials", "One row per trial; val_loss in nats per target token, lower is better."
            ),
        ],
    )


def transcoders_section(base: pd.DataFrame, deltas: pd.DataFrame) -> Section | None:
    """The base transcoders and the search for the deltas."""
    blocks: list[Block] = []
    if len(base):
        columns = {
            name: name for name in ("layer", "percentile", "target_l0", "val_l0", "val_fvu", "dead_fraction", "path")
        }
        help = "FVU: share of the un-finetuned MLP's output variance left unexplained on held-out text; 0 is perfect."
        blocks.append(table_block(base, columns, "Base transcoders", help))
    if len(deltas):
        change = deltas[(deltas["target"] == "change") & deltas["best"].astype(bool)]
        if len(change):
            names = ("layer", "d_new", "val_unexplained", "change_share", "val_l0_delta", "val_cos", "dead_fraction")
            columns = {name: name for name in (*names, "tokens", "lr", "sparsity", "trial", "seconds")}
            help = "val_unexplained: the share of finetuning's change that is left on held-out text; 1 without a delta."
            blocks.append(table_block(change, columns, "Kept change deltas", help))
        deltas = deltas[deltas["target"] == "residual"]
    if len(deltas) and deltas["best"].astype(bool).any():
        kept = deltas[deltas["best"].astype(bool)].sort_values(["layer", "percentile", "d_new"], kind="stable")
        help = (
            "Lower is better; the gap between a solid line and the dashed line of its colour is what the delta repairs."
        )
        blocks.append(
            picture("delta_fvu", figures.unexplained_variance(deltas), "Residual deltas on held-out text", help)
        )
        columns = {
            name: name
            for name in (
                *("layer", "percentile", "d_new", "val_fvu", "val_fvu_base", "val_l0_delta", "val_cos", "val_l2_ratio"),
                *("dead_fraction", "tokens", "lr", "sparsity", "trial", "seconds"),
            )
        }
        better = int((kept["val_fvu"] < kept["val_fvu_base"]).sum())
        help = f"{better} of {len(kept)} kept deltas explain more held-out variance than their base alone."
        blocks.append(table_block(kept, columns, "Kept residual deltas", help))
        columns = {"layer": "layer", "percentile": "percentile", "d_new": "d_new", "trial": "trial", "state": "state"}
        figures_of = ("val_loss", "val_fvu", "val_l0_delta", "pareto", "lr", "sparsity", "seconds")
        columns |= {name: name for name in figures_of if name in deltas}
        help = "Every delta trial; losses compare only within one layer and percentile."
        blocks.append(table_block(deltas, columns, "All residual delta trials", help))
    intro = "A base transcoder stands in for an MLP of the un-finetuned model; a delta adds d_new features to it."
    return _section("transcoders", "Transcoders", intro, blocks)


def _section(anchor: str, title: str, intro: str, blocks: Sequence[Block]) -> Section | None:
    return Section(anchor, title, intro, blocks) if blocks else None

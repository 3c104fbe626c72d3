"""The section of the report before any deltas: in which parts of the model the finetuning lives.

In: a sweep's table of parts. Out: a section of the page with a picture and a table.
"""

from collections.abc import Sequence

import pandas as pd

from evaluators.report import knob_figures
from evaluators.report.page import Block, Section, picture, table_block

STAND_IN = "The parts stand in for each other, so neither share may be called the part's own."
COLUMNS = {
    "subset": "subset",
    "part": "part",
    "layers": "layers",
    "unfinetuned_ce": "CE, only it un-finetuned",
    "unfinetuned": "share lost",
    "finetuned_ce": "CE, only it finetuned",
    "finetuned": "share brought",
    "n_examples": "prompts",
}


def parts_section(blocks: Sequence[Block], pair: str) -> Section:
    """The section of these blocks. `pair` says which two models are compared."""
    intro = (
        f"{pair} Before asking what deltas explain: which parts of the model does the effect of finetuning need, and "
        "which bring it about alone?"
    ).strip()
    return Section("parts", "Where the finetuning lives", intro, blocks)


def parts_blocks(table: pd.DataFrame, *, seed: int) -> list[Block]:
    """The picture, where there is an effect to share out, and the table of a sweep's or a look's parts; empty where no
    parts were measured."""
    if table.empty:
        return []
    blocks: list[Block] = []
    if table["share"].notna().any():
        figure = knob_figures.where_it_lives(table, seed=seed)
        help = (
            "The share of finetuning's whole effect on CE that is lost when one part alone is un-finetuned, and the "
            f"share that this part alone brings when it is finetuned. {STAND_IN}"
        )
        blocks.append(picture("parts", figure, "Where the finetuning lives", help))
    help = (
        "CE in nats per target token. Patterns are attention's query and key projections, the rest is what lies in no "
        f"part, such as embeddings. {STAND_IN} Shares are of the whole effect, whether finetuning lowered CE or raised "
        "it; those above 1 go beyond it, and those below 0 go against it. No share is shown where the whole effect's "
        "interval contains 0."
    )
    blocks.append(table_block(_both_ways(table), COLUMNS, "Parts", help))
    return blocks


def _both_ways(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each subset and part, with the columns of both ways."""
    place = ["subset", "part", "layers", "n_examples"]
    names = {"mean_ce": "_ce", "share": "", "share_low": "_low", "share_high": "_high"}
    ways = [
        table[table["way"] == way].set_index(place)[list(names)].set_axis([way + end for end in names.values()], axis=1)
        for way in knob_figures.WAYS
    ]
    return pd.concat(ways, axis=1).reset_index()

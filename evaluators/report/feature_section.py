"""The section of the report on single features.

In: the features table. Out: a section of the page, the features of largest effect first.
"""

import pandas as pd

from evaluators.report.page import Section, Table, table_block
from evaluators.tables.pooling import RATE

SHOWN = 40
"""Features on the page; the others are in features.csv."""


def features_section(table: pd.DataFrame) -> Section | None:
    """What single features do, the strongest first."""
    if table.empty:
        return None
    subsets = [name[12:] for name in table if name.startswith("firing_rate_")]
    columns = {"layer": "layer", "feature": "feature"}
    columns |= {f"firing_rate_{subset}": f"fires on {subset}" for subset in subsets}
    columns |= {f"delta_ce_{subset}": f"CE, ablated - full, {subset}" for subset in subsets}
    for subset in subsets:
        ends = f"{RATE}_{subset}"
        rates = [name for name in table if name.startswith("delta_") and name.endswith(ends)]
        columns |= {
            name: f"{name.removeprefix('delta_').removesuffix(f'_{subset}')}, ablated - full, {subset}"
            for name in rates
        }
    columns |= {"attribution": "estimate"}
    measured = table[table["effect"].notna()]
    help = (
        f"{len(measured)} of {len(table)} features were ablated alone under full, those of the largest estimate; "
        "differences with paired 95% intervals over prompts, strongest first. The estimate is activation times "
        "gradient, nats a target token over all subsets; firing is the share of tokens."
    )
    effects = table_block(table.head(SHOWN), columns, "Effect of single features", help)
    read = table[table["contexts"] != ""].head(SHOWN)
    meanings = Table(
        "What they read and write",
        "Tokens that the decoder direction promotes and suppresses through the unembedding, and the strongest contexts "
        "with the firing token in guillemets.",
        ["layer", "feature", "promotes", "suppresses", "strongest contexts"],
        [
            [str(row["layer"]), str(row["feature"]), row["promoted"], row["suppressed"], row["contexts"]]
            for _, row in read.iterrows()
        ],
        wide_text=True,
        folded=True,
    )
    intro = "Each delta feature on its own: where it fires, which tokens it moves, and what is missing without it."
    return Section("features", "Features", intro, [effects, meanings])

"""Finished behaviour cells become per-prompt sums, replica by replica.

In: cells as the evaluation writes them (`rows`: one entry per prompt). Out: `{CellKey: PromptSums}` in table order;
every metric is a ratio of two sums over prompts, which is what the bootstrap resamples.
"""

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from sites import label_of_keys, label_order

Cell = dict[str, Any]

RATE = "_rate"
"""Suffix of a behaviour's name in column names."""
MEANS = {  # table column -> (per-prompt sum, per-prompt token count)
    "mean_ce": ("nll", "n_tokens"),
    "kl": ("kl", "n_tokens"),
    "mean_abs_base_acts": ("sum_abs_base_acts", "n_act_tokens"),
    "mean_abs_delta_acts": ("sum_abs_delta_acts", "n_act_tokens"),
}
TARGETS = ("", "change", "residual")
"""Targets of the deltas in a cell, in the order of the tables; empty if nothing is spliced."""


class CellKey(NamedTuple):
    """Identifies a table row; cells with the same key and different seeds are its replicas."""

    target: str
    layer: str
    percentile: float | None
    d_new: int | None
    condition: str
    alpha: float | None
    subset: str
    convention: str


class PromptSums(NamedTuple):
    """Per-prompt sums of every metric; `metric = tops.sum((0, 1)) / bottoms.sum((0, 1))`."""

    metrics: tuple[str, ...]  # MEANS, then the rates
    prompts: NDArray[np.int64]  # (prompt,), ascending: the prompt's number within its subset
    tops: NDArray[np.float64]  # (replica, prompt, metric)
    bottoms: NDArray[np.float64]  # (replica, prompt, metric): tokens for means, 1 or 0 (undefined) for rates

    @property
    def replicas(self) -> int:
        return len(self.tops)

    def take(self, shared: NDArray[np.int64]) -> "PromptSums":
        """The same sums over the prompts in `shared` (sorted, all present)."""
        rows = np.searchsorted(self.prompts, shared)
        return PromptSums(self.metrics, shared, self.tops[:, rows], self.bottoms[:, rows])


def rates_of(cells: Iterable[Cell]) -> tuple[str, ...]:
    """The column names of the rates in behaviour cells, in the order of the settings."""
    names = (name for cell in of_kind(cells, "behaviour") for name in cell.get("behaviours", ()))
    return tuple(f"{name}{RATE}" for name in dict.fromkeys(names))


def rates_in(table: pd.DataFrame) -> list[str]:
    """The rate columns of a table of behaviour."""
    return [name for name in table.columns if name.endswith(RATE) and not name.startswith("delta_")]


def condition_order(condition: str) -> tuple[int, str]:
    """Sort key of a condition name: raw, no_delta, full, alpha, then the controls by name."""
    known = ("raw", "no_delta", "full", "alpha")
    return (known.index(condition) if condition in known else len(known)), condition


def pool(cells: Iterable[Cell]) -> dict[CellKey, PromptSums]:
    """Behaviour cells as per-prompt sums by key, in table order; cells of one seed are averaged. Subsets keep the order
    of the cells, which is that of the rows' labels.

    Raises ValueError if cells with the same key hold different prompts.
    """
    cells = of_kind(cells, "behaviour")
    metrics = (*MEANS, *rates_of(cells))
    gathered: dict[CellKey, dict[int, list[PromptSums]]] = {}
    for cell in cells:
        gathered.setdefault(_key(cell), {}).setdefault(cell["seed"], []).append(_prompt_sums(cell["rows"], metrics))
    subsets = list(dict.fromkeys(cell["subset"] for cell in cells))
    pooled = {}
    for key in sorted(gathered, key=lambda key: table_order(key, subsets)):
        seeds = [gathered[key][seed] for seed in sorted(gathered[key])]
        prompts = seeds[0][0].prompts
        if any(not np.array_equal(sums.prompts, prompts) for of_seed in seeds for sums in of_seed):
            raise ValueError(f"replicas of the cell {key} hold different prompts; evaluate it again with --fresh")
        tops = np.concatenate([np.mean([sums.tops for sums in of_seed], axis=0) for of_seed in seeds])
        bottoms = np.concatenate([np.mean([sums.bottoms for sums in of_seed], axis=0) for of_seed in seeds])
        pooled[key] = PromptSums(metrics, prompts, tops, bottoms)
    return pooled


def of_kind(cells: Iterable[Cell], kind: str) -> list[Cell]:
    """The cells of one kind, such as `"behaviour"`, in the order given."""
    return [cell for cell in cells if cell["kind"] == kind]


def _key(cell: Cell) -> CellKey:
    condition, alpha, d_new = cell["condition"], cell["alpha"], cell["d_new"]
    if condition == "no_delta":  # the delta is not used: one row, whatever the cell's d_new
        alpha, d_new = 0.0, None
    elif condition == "full":
        alpha = 1.0
    return CellKey(
        cell["target"],
        label_of_keys(cell["layers"]),
        cell["percentile"],
        d_new,
        condition,
        alpha,
        cell["subset"],
        cell["convention"],
    )


def table_order(key: CellKey, subsets: list[str]) -> tuple:
    """Sort key of table rows, with the subsets in their order."""
    numbers = tuple(-math.inf if value is None else value for value in (key.percentile, key.d_new, key.alpha))
    layers, subset = label_order(key.layer), subsets.index(key.subset)
    return (
        TARGETS.index(key.target),
        layers,
        numbers[0],
        condition_order(key.condition),
        numbers[1],
        numbers[2],
        subset,
        str(key.convention),
    )


def _prompt_sums(rows: list[dict[str, Any]], metrics: tuple[str, ...]) -> PromptSums:
    rows = sorted(rows, key=lambda row: row["index"])
    tops = np.zeros((len(rows), len(metrics)))
    bottoms = np.zeros_like(tops)
    for line, row in enumerate(rows):
        for column, (top, bottom) in enumerate(MEANS.values()):
            if row.get(top) is not None:
                tops[line, column], bottoms[line, column] = row[top], row[bottom]
        for column, metric in enumerate(metrics[len(MEANS) :], start=len(MEANS)):
            outcome = row.get("behaviours", {}).get(metric.removesuffix(RATE))  # None: undefined for that prompt
            if outcome is not None:
                tops[line, column], bottoms[line, column] = float(outcome), 1.0
    prompts = np.array([row["index"] for row in rows], dtype=np.int64)
    return PromptSums(metrics, prompts, tops[None], bottoms[None])


def means_of(cell: Cell) -> dict[str, float]:
    """The metrics of one behaviour cell by their table names, undefined ones left out."""
    sums = _prompt_sums(cell["rows"], (*MEANS, *rates_of([cell])))
    tops, bottoms = sums.tops.sum((0, 1)), sums.bottoms.sum((0, 1))
    means = {name: top / bottom for name, top, bottom in zip(sums.metrics, tops, bottoms, strict=True) if bottom}
    return {**means, "n_examples": float(len(sums.prompts)), "n_tokens": float(bottoms[0])}

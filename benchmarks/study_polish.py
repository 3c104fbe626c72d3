"""The gain from training all layers' deltas together: the same prompts, with the deltas before and after it.

In: the folders of two sweeps of one adapter, the second with `deltas.polish_steps`. Out: rows for
`docs/study/polish.csv`: for each width and subset, what is recovered before and after, and the paired differences.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from evaluators.tables.pooling import MEANS
from evaluators.tables.statistics import Estimate, paired_bootstrap, recovered_share

NAMES = {"mean_ce": "CE", "kl": "KL"}
Sums = tuple[np.ndarray, np.ndarray]


def polish(before: Path, after: Path) -> Iterator[dict[str, Any]]:
    """Rows of `subset`, `what`, `value`, `low`, `high` for every polished width."""
    manifests = sorted((after / "deltas" / "polished").glob("d*/manifest.json"))
    for manifest in manifests:
        width, figures = int(manifest.parent.name[1:]), json.loads(manifest.read_text())["figures"]
        for name in ("val_kl_before", "val_kl", "val_l0_before", "val_l0", "step"):
            yield _row("", f"{name}: {width}", Estimate(figures[name], np.nan, np.nan))
        for subset in _subsets(before):
            raw = _sums(before / "cells" / f"raw_{subset}.json")
            ground = _sums(_cell(before, f"*_change_d*_{subset}_no_delta"))
            pair = [_sums(_cell(sweep, f"*_change_d{width:03d}_{subset}_full")) for sweep in (before, after)]
            for when, sums in zip(("before", "after"), pair, strict=True):
                share = recovered_share(ground["mean_ce"], sums["mean_ce"], raw["mean_ce"])
                yield _row(subset, f"recovered {when}: {width}", share)
            for metric, name in NAMES.items():
                difference = paired_bootstrap(*pair[1][metric], *pair[0][metric])
                yield _row(subset, f"{name} after - before: {width}", difference)


def _row(subset: str, what: str, estimate: Estimate) -> dict[str, Any]:
    return {"subset": subset, "what": what, **estimate._asdict()}


def _subsets(sweep: Path) -> list[str]:
    return [path.stem.removeprefix("raw_") for path in sorted((sweep / "cells").glob("raw_*.json"))]


def _cell(sweep: Path, pattern: str) -> Path:
    """The cell of that name with the most layers."""
    cells = list((sweep / "cells").glob(f"{pattern}.json"))
    largest_last = sorted(cells, key=lambda path: len(json.loads(path.read_text())["layers"]))
    if not largest_last:
        raise FileNotFoundError(f"{sweep} has no cell {pattern}; run the sweep to its end")
    return largest_last[-1]


def _sums(cell: Path) -> dict[str, Sums]:
    """Numerators and denominators of each prompt, by metric."""
    rows = sorted(json.loads(cell.read_text())["rows"], key=lambda row: row["index"])
    columns = {metric: MEANS[metric] for metric in NAMES}
    return {
        metric: (np.array([row.get(top) or 0.0 for row in rows]), np.array([row[bottom] for row in rows]))
        for metric, (top, bottom) in columns.items()
    }

"""What a finished trial or cell becomes in MLflow.

In: results as stored on disk. Out: runs under their stage, named like the files.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jobs.files import read_json
from jobs.tracking.writer import Record, Tracker

STATUS = {"COMPLETE": "FINISHED", "STOPPED": "KILLED", "FAILED": "FAILED"}


def record_trial(tracker: Tracker, stage: str, group: str, result: dict[str, Any]) -> None:
    name = f"trial_{result['trial']:04d}" if group == stage else f"{group}/trial_{result['trial']:04d}"
    tracker.record(
        Record(
            f"{stage}/{name}@{result['started']:.3f}",
            name,
            stage,
            params={**result["params"], **_place(group), "state": result["state"], "reason": result["reason"]},
            metrics=result["figures"],
            history=result["history"],
            status=STATUS[result["state"]],
            started=result["started"],
            seconds=result["seconds"],
        )
    )


def record_polish(tracker: Tracker, name: str, manifest: dict[str, Any]) -> None:
    """The run in which all layers' deltas of a width were trained together."""
    tracker.record(
        Record(
            f"deltas/polished/{name}@{manifest['key']}",
            f"polished/{name}",
            "deltas",
            params=manifest["settings"],
            metrics=manifest["figures"],
            history=manifest["history"],
            seconds=manifest["seconds"],
        )
    )


def record_base(tracker: Tracker, layer: int, key: str, base: dict[str, Any]) -> None:
    tracker.record(
        Record(
            f"transcoders/{base['path']}@{key}",
            base["path"],
            "transcoders",
            params={"layer": layer, "target_l0": base["target_l0"], "path": base["path"]},
            metrics=base,
        )
    )


def record_cells(tracker: Tracker, folder: Path, names: Iterable[str]) -> None:
    from evaluators.tables.pooling import cell_metrics

    for name in names:
        cell = read_json(folder / f"{name}.json")
        record_cell(tracker, name, cell, cell_metrics(cell))


def record_cell(tracker: Tracker, name: str, cell: dict[str, Any], metrics: dict[str, Any]) -> None:
    places = (
        "kind",
        "target",
        "layers",
        "layer",
        "percentile",
        "d_new",
        "condition",
        "alpha",
        "subset",
        "base",
        "convention",
    )
    tracker.record(
        Record(
            f"evaluate/{name}@{cell['key']}",
            name,
            "evaluate",
            params={key: _shown(cell[key]) for key in places if cell.get(key) not in (None, "")},
            metrics=metrics,
            seconds=cell["seconds"],
        )
    )


def _shown(value: Any) -> Any:
    """Several layers as `1+2`, as in file names; MLflow's pages would break a list into lines."""
    return "+".join(map(str, value)) if isinstance(value, list) else value


def _place(group: str) -> dict[str, Any]:
    """`layer_08/p0.50/d032` as parameters."""
    parts = group.split("/")
    if len(parts) != 3:
        return {}
    layer, selection, d_new = parts
    base = {"percentile": float(selection[1:])} if selection.startswith("p") else {}
    target = "change" if selection == "change" else "residual"
    return {"layer": int(layer[6:]), "target": target, **base, "d_new": int(d_new[1:])}

"""What a finished trial or base becomes in MLflow.

In: results as stored on disk. Out: runs under their stage, named like the files.
"""

from __future__ import annotations

from typing import Any

from jobs.tracking.writer import Record, Tracker
from sites import Address

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
    """Records the run that trained all layers' deltas of one width together."""
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


def _place(group: str) -> dict[str, Any]:
    """`layer_08/p0.50/d032` as parameters; empty for a group without deltas."""
    try:
        site, ground, d_new = Address.parse(group)
    except ValueError:
        return {}
    base = {} if ground.percentile is None else {"percentile": ground.percentile}
    return {"layer": site.key, "target": ground.target, **base, "d_new": d_new}

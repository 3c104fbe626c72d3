"""The progress of a sweep.

In: a `Context`. Out: rows of text, from the results on disk. Imports nothing heavy, to answer at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jobs.context import keys
from jobs.context.context import Context
from jobs.files import MANIFEST, SEAL, is_for, read_json
from jobs.progress import clock, read_progress
from jobs.sweep.stage_list import STAGES

Rows = list[tuple[str, str]]


def status_rows(context: Context) -> Rows:
    """The progress of the sweep with these settings."""
    space, settings = context.space, context.settings
    rows: Rows = []
    if progress := read_progress(space.folder):
        rows.append(
            ("running" if progress["running"] else "stopped at", "; ".join([progress["stage"], *progress["bars"]]))
        )
    for stage in STAGES:
        manifest = read_json(stage.folder(context) / MANIFEST)
        if stage.finished(context):
            rows.append((stage.name, f"done in {clock(manifest['seconds'])}"))
        else:
            rows.append((stage.name, "to do"))
    if settings.model.finetuned:
        rows.append(finetuned_row(context))
    else:
        results = _results(space.lora, keys.lora_group(settings))
        rows.append(("LoRA trials", _counts(results, settings.lora.trials)))
    groups = [(space.deltas / address.folder, keys.delta_group(settings, address)) for address in context.delta_groups]
    results = [result for folder, key in groups for result in _results(folder, key)]
    rows.append(("delta trials", _counts(results, len(groups) * settings.deltas.trials)))
    cells = [path for path in space.cells.glob("*.json") if path.name not in (MANIFEST, SEAL)]
    rows.append(("cells", f"{len(cells)} on disk"))
    rows += [
        ("failed", f"{result['group']} trial {result['trial']}: {result['reason']}")
        for result in results
        if result["reason"]
    ]
    return rows


def _results(folder: Path, key: str) -> list[dict[str, Any]]:
    """The results of the trials in `folder`; empty if they are from other settings and will be redone."""
    return [read_json(path) for path in sorted(folder.glob("trial_*/result.json"))] if is_for(folder, key) else []


def _counts(results: list[dict[str, Any]], total: int) -> str:
    states = [result["state"] for result in results]
    parts = [f"{states.count(state)} {state.lower()}" for state in ("COMPLETE", "STOPPED", "FAILED") if state in states]
    return f"{len(results)} of {max(total, len(results))}" + (f" ({', '.join(parts)})" if parts else "")


def finetuned_row(context: Context) -> tuple[str, str]:
    """The origin of the finetuned model."""
    settings = context.settings
    if settings.model.finetuned:
        return "finetuned model", f"{settings.model.finetuned}, adopted"
    return "LoRA", f"{settings.lora.trials} trials of {settings.lora.steps} steps"

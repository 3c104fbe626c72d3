"""How far a sweep has got.

In: a `Context`. Out: rows of text, read off the results on disk; nothing heavy is imported, so that it answers at once.
"""

from __future__ import annotations

from typing import Any

from jobs.files import MANIFEST, read_json
from jobs.progress import clock, read_progress
from jobs.study.context import Context
from jobs.study.stage_list import STAGES

Rows = list[tuple[str, str]]


def status_rows(context: Context) -> Rows:
    """How far the sweep with these settings has got."""
    space, settings = context.space, context.settings
    rows: Rows = []
    if shown := read_progress(space.folder):
        rows.append(("running" if shown["running"] else "stopped at", "; ".join([shown["stage"], *shown["bars"]])))
    for stage in STAGES:
        manifest = read_json(stage.folder(context) / MANIFEST)
        if stage.finished(context):
            rows.append((stage.name, f"done in {clock(manifest['seconds'])}"))
        else:
            rows.append((stage.name, "to do"))
    if settings.model.finetuned:
        rows.append(finetuned_row(context))
    else:
        results = [read_json(path) for path in sorted(space.folder.glob("lora/trial_*/result.json"))]
        rows.append(("LoRA trials", _counts(results, settings.lora.trials)))
    groups = len(context.delta_groups)
    results = [read_json(path) for path in sorted(space.deltas.glob("layer_*/*/d*/trial_*/result.json"))]
    rows.append(("delta trials", _counts(results, groups * settings.deltas.trials)))
    cells = [path for path in space.cells.glob("*.json") if path.name != MANIFEST]
    rows.append(("cells", f"{len(cells)} on disk"))
    rows += [("failed", f"{one['group']} trial {one['trial']}: {one['reason']}") for one in results if one["reason"]]
    return rows


def _counts(results: list[dict[str, Any]], total: int) -> str:
    states = [one["state"] for one in results]
    named = [f"{states.count(state)} {state.lower()}" for state in ("COMPLETE", "STOPPED", "FAILED") if state in states]
    return f"{len(results)} of {max(total, len(results))}" + (f" ({', '.join(named)})" if named else "")


def finetuned_row(context: Context) -> tuple[str, str]:
    """Where the finetuned model comes from."""
    settings = context.settings
    if settings.model.finetuned:
        return "finetuned model", f"{settings.model.finetuned}, adopted"
    return "LoRA", f"{settings.lora.trials} trials of {settings.lora.steps} steps"

"""Stage 5, evaluate: reconstruction of every kept delta, and behaviour over layers, conditions and strengths.

In: the finetuned model, bases, kept deltas and evaluation rows. Out: `cells/*.json` and `generations/*.jsonl`, one file
per finished cell, and `checks_*.json`. Existing cells with the same key are not computed again.
`measure_ceiling` computes those that need no deltas, before any are trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jobs.capture.moments import write_moments
from jobs.context.context import Context
from jobs.errors import WorkFailed
from jobs.evaluation.kinds import BY_NAME, CEILING, ROUNDS, Exactness, evaluate, works_of
from jobs.evaluation.work import PlanInputs, Work
from jobs.files import read_json
from jobs.sweep.stages.data import check_labels
from jobs.tracking.writer import Record
from models.sources import model_facts


def run(context: Context) -> dict[str, Any]:
    check_labels(context)
    inputs = PlanInputs(context)
    chosen = inputs.chosen
    works: list[Work] = []
    for label, kinds in ROUNDS.items():
        round_works = works_of(inputs, kinds)  # only now: some are planned from an earlier round's cells
        failed = _compute(context, round_works, label)
        if kinds == CEILING:
            _stop_at(failed)
        works += round_works
    names = [name for work in works for name in work.cells()]
    finished = [name for name in names if (context.space.cells / f"{name}.json").is_file()]
    used = {target: {"percentile": ground.percentile, "d_new": d_new} for target, (ground, d_new) in chosen.items()}
    checks = {work.name: work.key for work in works if isinstance(work, Exactness)}
    return {"chosen": used, "cells": finished, "exactness": checks}


def measure_ceiling(context: Context) -> None:
    """Measures both models, and which parts of the model the finetuning is in: how much there is to explain, before any
    delta is trained. These cells are tracked with all others, once their stage is open."""
    from evaluators.report.look_page import in_ten_lines
    from evaluators.report.report import first_look

    check_labels(context)
    works = works_of(PlanInputs(context), CEILING)
    _stop_at(_compute(context, works, "ceiling", is_tracked=False))
    cells = [read_json(context.space.cells / f"{name}.json") for work in works for name in work.cells()]
    if (look := first_look(cells, "")) is not None:
        for line in in_ten_lines(look, seed=context.settings.seed):
            context.progress.line(f"  {line}")


def _stop_at(failed: list[str]) -> None:
    if failed:
        raise WorkFailed("the raw model could not be evaluated: " + "; ".join(failed))


def _compute(context: Context, works: list[Work], label: str, is_tracked: bool = True) -> list[str]:
    """Runs the missing work, longest first, and tracks every existing cell; returns the failures with their reasons."""

    n_layers = model_facts(context.model)["n_layers"]
    missing: list[Work] = []
    total = finished = 0
    for work in works:
        cells = work.cells()
        reusable = work.reusable(current_cells(context.space.cells, cells))
        if is_tracked:
            record_cells(context, sorted(reusable))
        total, finished = total + len(cells), finished + len(reusable)
        if len(reusable) < len(cells) or not (cells or work.is_finished()):
            missing.append(work.remaining(reusable))
    places = [(plan.site, plan.ground) for work in missing if work.needs_moments for plan in work.sites]
    write_moments(context, list(dict.fromkeys(places)))
    missing.sort(key=lambda work: -work.cost(n_layers))
    failed = []
    cost = sum(work.cost(n_layers) for work in missing)
    with context.progress.bar(label, total, "cells", cost) as bar:
        bar.start_at(finished)
        retries = context.settings.compute.max_retries
        for outcome in context.pool.run(evaluate, missing, retries, affinity=lambda work: work.affinity):
            if outcome.error:
                failed.append(f"cells {outcome.task.name}: {outcome.error}")
            elif is_tracked:
                record_cells(context, outcome.result)
            cost, other_workers = outcome.task.cost(n_layers), context.share.at_once - 1
            bar.advance(len(outcome.task.cells()), cost, other_workers)
    context.failures += failed
    return failed


def current_cells(folder: Path, keys: Mapping[str, str]) -> dict[str, list[float]]:
    """The cells that have these keys, each with the strengths it was measured with. Others of the same names, which are
    from earlier settings, are deleted, so that nothing reads them if the new ones fail."""
    current = {}
    for name, key in keys.items():
        cell = read_json(folder / f"{name}.json")
        if cell and cell["key"] == key:
            current[name] = cell.get("strengths", [])
        elif cell:
            (folder / f"{name}.json").unlink(missing_ok=True)
    return current


def record_cells(context: Context, names: Iterable[str]) -> None:
    """Sends finished cells to MLflow."""
    for name in names:
        cell = read_json(context.space.cells / f"{name}.json")
        kind = BY_NAME[cell["kind"]]
        key, params, metrics = f"evaluate/{name}@{cell['key']}", kind.params(cell), kind.metrics(cell)
        context.tracker.record(Record(key, name, "evaluate", params=params, metrics=metrics, seconds=cell["seconds"]))

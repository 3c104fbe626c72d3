"""Stage 5, evaluate: reconstruction of every kept delta, and behaviour over layers, conditions and strengths.

In: the finetuned model, bases, kept deltas and evaluation rows. Out: `cells/*.json` and `generations/*.jsonl`, one file
per finished cell, and `checks.json`. Existing cells with the same key are not computed again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evaluators.conditions import CONDITIONS
from jobs.capture.moments import write_moments
from jobs.context.context import Context
from jobs.errors import WorkFailed
from jobs.evaluation import plan as pieces
from jobs.evaluation.kinds import evaluate
from jobs.evaluation.plan import Combination, combination
from jobs.evaluation.work import Work
from jobs.files import read_json
from jobs.study.stages.data import check_labels
from jobs.tracking.records import record_cells
from models.sources import model_facts

RANKED = {name for name, condition in CONDITIONS.items() if condition.ranked}
"""Controls that are fitted to what the deltas were trained on."""


def run(context: Context) -> dict[str, Any]:
    check_labels(context)
    chosen: dict[str, Combination] = {one: combination(context, one) for one in context.settings.deltas.targets}
    rankings = pieces.ranking_work(context, chosen)
    first = [*pieces.raw_work(context), *rankings]
    _compute(context, first, "raw model")
    rest = [
        *(work for target in chosen for work in pieces.behaviour_work(context, target, chosen[target])),
        *pieces.widths_work(context, chosen),
        *pieces.curve_work(context, rankings),
        *pieces.cards_work(context, rankings),
        *pieces.change_work(context),
        *pieces.reconstruction_work(context),
    ]
    checks = pieces.exactness_work(context, chosen)
    rest += [one for one in checks if (read_json(checks_file(context, one.name)) or {}).get("key") != one.key]
    _compute(context, rest, "evaluation")
    names = [name for work in [*first, *rest] for name in work.cells()]
    done = [name for name in names if (context.space.cells / f"{name}.json").is_file()]
    kept = {target: {"percentile": one.ground.percentile, "d_new": one.d_new} for target, one in chosen.items()}
    return {"chosen": kept, "cells": done, "exactness": {one.name: one.key for one in checks}}


def checks_file(context: Context, name: str) -> Path:
    return context.space.folder / f"{name}.json"


def _compute(context: Context, works: list[Work], label: str) -> None:
    """Runs the missing work, longest first, and tracks every existing cell."""

    def there(cells: dict[str, str]) -> dict[str, list[float]]:
        """Finished cells, each with the strengths it was measured with."""
        held = {name: read_json(context.space.cells / f"{name}.json") for name in cells}
        return {name: one.get("strengths", []) for name, one in held.items() if one and one["key"] == cells[name]}

    missing: list[Work] = []
    total = finished = 0
    for work in works:
        cells = work.cells()
        done = work.staying(there(cells))
        record_cells(context.tracker, context.space.cells, sorted(done))
        total, finished = total + len(cells), finished + len(done)
        if len(done) < len(cells) or not cells:
            missing.append(work.without(done))
    fit = [work for work in missing if RANKED & set(work.conditions)]
    write_moments(context, list(dict.fromkeys((site.layer, site.ground) for work in fit for site in work.sites)))
    missing.sort(key=lambda work: -_layers_to_run(context, work))
    cost = sum(_layers_to_run(context, work) for work in missing)
    with context.progress.bar(label, total, "cells", cost) as bar:
        bar.start_at(finished)
        retries = context.settings.compute.max_retries
        for outcome in context.pool.run(evaluate, missing, retries, group=lambda work: work.group):
            if outcome.error:
                context.failures.append(f"cells {outcome.task.name}: {outcome.error}")
            else:
                record_cells(context.tracker, context.space.cells, outcome.result)
            cost, others = _layers_to_run(context, outcome.task), context.share.at_once - 1
            bar.advance(len(outcome.task.cells()), cost, others)
    if label == "raw model" and context.failures:
        raise WorkFailed("the raw model could not be evaluated: " + "; ".join(context.failures))


def _layers_to_run(context: Context, work: Work) -> int:
    """How long a piece of work takes, in layers for each row: passes times the layers above the first splice."""
    count = model_facts(context.model)["n_layers"]
    above = count - work.sites[0].layer if work.sites else count
    if work.kind == "reconstruction":  # every subset's rows, and every position is projected to the vocabulary
        passes = 1 + len({plan.candidate for plan in work.sites}) + len(work.sites)
        return passes * len(work.shared.subsets) * (above + count // 4)
    if work.kind == "cards":  # two ways of each, on some of the rows, from the feature's layer on
        return (4 + len(work.features)) * len(work.shared.subsets) * above // 2
    if work.kind in ("ranking", "exactness"):
        return 8 * above
    if work.kind == "curve":
        return above * sum(plan.d_new for plan in work.sites).bit_length()
    answered = work.kind in ("behaviour", "width")
    controls = sum(asked[0] in work.controls for asked in work.asked) if answered else 0
    each = 4 if answered else 1  # its rows are scored and also answered, token by token
    return each * (max(1, len(work.strengths)) * above + controls * count)

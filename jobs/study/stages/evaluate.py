"""Stage 5, evaluate: reconstruction of every kept delta, and behaviour over layers, conditions and strengths.

In: the finetuned model, bases, kept deltas and evaluation rows. Out: `cells/*.json` and `generations/*.jsonl`, one file
per finished cell, and `checks.json`. Existing cells with the same key are not computed again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.errors import WorkFailed
from jobs.files import key_of, read_json
from jobs.study import keys
from jobs.study.context import Context
from jobs.study.stages.cells import evaluate
from jobs.study.stages.deltas import STAGE as DELTAS
from jobs.study.stages.deltas import group_name, replica_folder
from jobs.study.stages.transcoders import chosen_base, root
from jobs.study.stages.work import Evaluation, ModelSpec, SitePlan, Work
from jobs.study.workspace import FINETUNED
from jobs.tracking.records import record_cells
from models.gemma_scope import selection_label
from models.sources import model_facts


def run(context: Context) -> dict[str, Any]:
    percentile, d_new = behaviour_combination(context)
    first = _raw_work(context)
    _compute(context, first, "raw model")
    rest = [
        *behaviour_work(context, percentile, d_new),
        *_reconstruction_work(context),
        *_features_work(context, percentile, d_new),
    ]
    checks = context.space.folder / "checks.json"
    exactness = _exactness_work(context, percentile, d_new)
    if (read_json(checks) or {}).get("key") != exactness[0].key:
        rest += exactness
    _compute(context, rest, "evaluation")
    names = [name for work in [*first, *rest] for name in work.cells()]
    done = [name for name in names if (context.space.cells / f"{name}.json").is_file()]
    return {"percentile": percentile, "d_new": d_new, "cells": done, "exactness": exactness[0].key}


def behaviour_combination(context: Context) -> tuple[float | None, int]:
    """The (percentile, d_new) whose deltas are spliced: as set, or the one with the lowest mean validation FVU over
    layers."""
    settings = context.settings
    chosen = settings.evaluate.percentile
    percentiles = [chosen] if chosen is not None else settings.deltas.selections
    widths = [settings.evaluate.d_new] if settings.evaluate.d_new is not None else settings.deltas.d_new
    means: dict[tuple[float | None, int], float] = {}
    for percentile in percentiles:
        for d_new in widths:
            best = [_best(context, layer, percentile, d_new) for layer in context.layers]
            values = [one["figures"]["val_fvu"] for one in best if one is not None]
            if len(values) == len(best):
                means[percentile, d_new] = sum(values) / len(values)
    if not means:
        raise WorkFailed("no (percentile, d_new) has a delta on every layer: " + "; ".join(context.failures))
    return min(means, key=lambda pair: (means[pair], pair[0] or 0.0, pair[1]))


def _compute(context: Context, works: list[Work], label: str) -> None:
    """Runs the missing work, longest first, and tracks every existing cell."""

    def there(name: str, key: str) -> bool:
        held = read_json(context.space.cells / f"{name}.json")
        return held is not None and held["key"] == key

    missing: list[Work] = []
    total = finished = 0
    for work in works:
        cells = work.cells()
        done = {name for name, key in cells.items() if there(name, key)}
        record_cells(context.tracker, context.space.cells, sorted(done))
        total, finished = total + len(cells), finished + len(done)
        if len(done) < len(cells) or not cells:
            missing.append(work.without(done))
    missing.sort(key=lambda work: -_layers_to_run(context, work))
    with context.progress.bar(label, total, "cells") as bar:
        bar.update(finished)
        retries = context.settings.compute.max_retries
        for outcome in context.pool.run(evaluate, missing, retries, group=lambda work: work.group):
            if outcome.error:
                context.failures.append(f"cells {outcome.task.name}: {outcome.error}")
            else:
                record_cells(context.tracker, context.space.cells, outcome.result)
            bar.advance(len(outcome.task.cells()))
    if label == "raw model" and context.failures:
        raise WorkFailed("the raw model could not be evaluated: " + "; ".join(context.failures))


def _layers_to_run(context: Context, work: Work) -> int:
    """How long a piece of work takes, in layers per row: passes times the layers above the first splice."""
    count = model_facts(context.model)["n_layers"]
    above = count - work.sites[0].layer if work.sites else count
    if work.kind == "reconstruction":  # the rows of every subset, and every position is projected to the vocabulary
        passes = 1 + len({plan.candidate for plan in work.sites}) + len(work.sites)
        return passes * len(work.shared.subsets) * (above + count // 4)
    if work.kind == "features":  # forward, backward, and each ablation
        return (3 + work.shared.ablations) * len(work.shared.subsets) * above
    return max(1, len(work.strengths)) * above + sum(count for _ in work.controls)


def _shared(context: Context) -> Evaluation:
    section = context.settings.evaluate
    return Evaluation(
        cells=str(context.space.cells),
        rows=str(context.space.data / "evaluation.jsonl"),
        base_model=str(context.model),
        subsets=tuple(section.subsets),
        max_new_tokens=section.max_new_tokens,
        batch_size=section.batch_size,
        ablations=section.features,
    )


def _model(context: Context, folder: Path | None = None) -> ModelSpec:
    """The finetuned model, or the one in another folder, as workers load it."""
    from trainers.precision import resolve_precision

    settings, device = context.settings, context.device
    # On a CPU, bf16 is not worth the loss of exactness, so it must be set explicitly.
    precision = "fp32" if device == "cpu" and settings.compute.precision == "auto" else settings.compute.precision
    return ModelSpec(
        str(folder or context.space.lora / "merged"),
        device,
        resolve_precision(precision, device),
        settings.transcoders.convention,
    )


def _work(context: Context, kind: str, name: str, key: str, **asked: Any) -> Work:
    """A piece of work on the finetuned model, unless `asked` names another."""
    given = {"model": _model(context), "seed": context.settings.seed, **asked}
    return Work(kind, name, key, shared=_shared(context), **given)


def _raw_work(context: Context) -> list[Work]:
    """Nothing spliced: the finetuned model, and also the un-finetuned one if a control is measured against it."""
    from evaluators.conditions import CONDITIONS

    key = key_of("raw with text", keys.lora(context.settings), _evaluation_settings(context))
    settings = context.settings.evaluate
    models = {"raw": _model(context)}
    models |= {
        CONDITIONS[one].baseline: _model(context, context.model)
        for one in settings.controls
        if CONDITIONS[one].model == "base"
    }
    return [
        _work(context, "raw", f"{name}_{subset}", key, subset=subset, conditions=(name,), model=model)
        for name, model in models.items()
        for subset in settings.subsets
    ]


def behaviour_work(context: Context, percentile: float | None, d_new: int) -> list[Work]:
    from evaluators.conditions import CONDITIONS

    settings = context.settings.evaluate
    works = []
    for layers, doses in context.spliced.items():
        conditions = tuple(one for one in [*settings.conditions, *settings.controls] if one != "raw")
        elsewhere = tuple(one for one in conditions if CONDITIONS[one].model == "base")
        here = tuple(one for one in conditions if one not in elsewhere)
        sites = tuple(_site_plan(context, layer, percentile, d_new) for layer in layers)
        cell = ("cell", _lineage(context, sites), _evaluation_settings(context))
        key = key_of(*cell)
        for subset in settings.subsets:
            label = "+".join(f"{layer:02d}" for layer in layers)
            name = f"layer_{label}_{selection_label(percentile)}_d{d_new:03d}_{subset}"
            asked = {"sites": sites, "subset": subset}
            work = _work(context, "behaviour", name, key, **asked, conditions=here, doses=doses)
            works += [work, *(_of_replica(work, rank, key_of(*cell, rank)) for rank in range(1, settings.replicas))]
            if elsewhere:  # another model, so separate work
                model = _model(context, context.model)
                works.append(_work(context, "behaviour", name, key, **asked, conditions=elsewhere, model=model))
    return works


def _of_replica(work: Work, rank: int, key: str) -> Work:
    """The same cells for the kept trials' next best seeds, without those that do not use the delta."""
    from evaluators.conditions import CONDITIONS

    return replace(
        work,
        name=f"{work.name}_s{rank}",
        key=key,
        sites=tuple(site._replace(delta=str(replica_folder(Path(site.delta), rank))) for site in work.sites),
        conditions=tuple(one for one in work.conditions if CONDITIONS[one].uses_delta),
        doses=tuple(dose for dose in work.doses if dose),
        seed=work.seed + rank,
    )


def _reconstruction_work(context: Context) -> list[Work]:
    settings = context.settings.deltas
    works = []
    for layer in context.layers:
        sites = tuple(
            _site_plan(context, layer, percentile, d_new)
            for percentile in settings.selections
            for d_new in settings.d_new
            if _best(context, layer, percentile, d_new) is not None
        )
        if sites:
            works.append(_work(context, "reconstruction", f"reconstruction_layer_{layer:02d}", "", sites=sites))
    return works


def _features_work(context: Context, percentile: float | None, d_new: int) -> list[Work]:
    """Features of the deltas whose behaviour is evaluated, layer by layer; none if no feature is to be ablated."""
    settings = context.settings.evaluate
    works = []
    for layer in context.layers if settings.features else []:
        site = _site_plan(context, layer, percentile, d_new)
        name = f"features_layer_{layer:02d}_{selection_label(percentile)}_d{d_new:03d}"
        key = key_of("features", site.key, settings.features)
        works.append(_work(context, "features", name, key, sites=(site,)))
    return works


def _exactness_work(context: Context, percentile: float | None, d_new: int) -> list[Work]:
    sites = tuple(_site_plan(context, layer, percentile, d_new) for layer in context.layers)
    key = key_of("exactness", _lineage(context, sites), _evaluation_settings(context))
    return [_work(context, "exactness", "exactness checks", key, sites=sites)]


def _site_plan(context: Context, layer: int, percentile: float | None, d_new: int) -> SitePlan:
    base = chosen_base(context, layer, percentile)
    best = _best(context, layer, percentile, d_new)
    assert best is not None
    group = context.space.deltas / group_name(layer, percentile, d_new)
    plan = SitePlan(
        layer,
        percentile,
        d_new,
        root(context),
        (base.average_l0, base.path),
        delta=str(group / f"trial_{best['trial']:04d}"),
        inputs=str(context.space.activations / "finetuned" / "train" / f"layer_{layer:02d}"),
        residual=str(group.parent / "residual" / "train"),
        key="",
    )
    subsets = sorted(context.settings.evaluate.subsets)
    lineage = _lineage(context, (plan,))
    return plan._replace(key=key_of("reconstruction", lineage, _evaluation_settings(context), subsets))


def _best(context: Context, layer: int, percentile: float | None, d_new: int) -> dict[str, Any] | None:
    return read_json(context.space.folder / DELTAS / group_name(layer, percentile, d_new) / "best.json")


def _lineage(context: Context, sites: tuple[SitePlan, ...]) -> list[Any]:
    """What the sites' weights depend on, without the paths of this machine."""
    return [
        (site.layer, site.candidate, Path(site.delta).name, read_json(Path(site.delta).parent / "key.json"))
        for site in sites
    ]


def _evaluation_settings(context: Context) -> list[Any]:
    settings = context.settings
    finetuned = read_json(context.space.folder / FINETUNED)
    return [keys.lora(settings), finetuned, settings.evaluate.max_new_tokens, settings.compute.precision]

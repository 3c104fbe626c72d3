"""Stage 5, evaluate: reconstruction of every kept delta, and behaviour over layers, conditions and strengths.

In: the finetuned model, bases, kept deltas and evaluation rows. Out: `cells/*.json` and `generations/*.jsonl`, one file
a finished cell, and `checks.json`. Cells that are there with the same key are not computed again.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from data.rows import read_rows
from jobs import keys
from jobs.context import Context
from jobs.errors import WorkFailed
from jobs.fanout import fan_out
from jobs.stages.deltas import STAGE as DELTAS
from jobs.stages.deltas import group_name
from jobs.stages.loaded import bridge
from jobs.stages.records import record_cell
from jobs.stages.transcoders import chosen_base, root
from jobs.workspace import key_of, read_json, write_json

CHECK_ROWS = 2
"""Rows of each subset in the exactness checks."""
TEXT_CELL = "raw_text"


class SitePlan(NamedTuple):
    """A site as files: where its base and delta lie."""

    layer: int
    root: str
    candidate: tuple[float, str]
    delta: str


class Work(NamedTuple):
    """What a worker is given: sites that share a model, and the cells asked of them."""

    kind: str
    name: str
    sites: tuple[SitePlan, ...]
    subset: str
    strengths: tuple[float, ...]
    percentile: float | None
    d_new: tuple[int, ...]
    key: str
    model: str
    folder: str
    rows: str
    device: str
    precision: str
    max_new_tokens: int
    batch_size: int
    seed: int


def run(context: Context) -> dict[str, Any]:
    percentile, d_new = behaviour_combination(context)
    first = _raw_work(context)
    _compute(context, first, "raw model")
    rest = [
        *_behaviour_work(context, percentile, d_new),
        *_reconstruction_work(context),
    ]
    checks = context.space.folder / "checks.json"
    exactness = _exactness_work(context, percentile, d_new)
    if (read_json(checks) or {}).get("key") != exactness[0].key:
        rest += exactness
    _compute(context, rest, "evaluation")
    names = [name for work in [*first, *rest] for name in _cell_names(work)]
    done = [name for name in names if name != TEXT_CELL and (context.space.cells / f"{name}.json").is_file()]
    return {"percentile": percentile, "d_new": d_new, "cells": done}


def behaviour_combination(context: Context) -> tuple[float, int]:
    """The (percentile, d_new) whose deltas are spliced: as set, or of the lowest mean validation FVU over layers."""
    settings = context.settings
    percentiles = (
        [settings.evaluate.percentile] if settings.evaluate.percentile is not None else settings.deltas.percentiles
    )
    widths = [settings.evaluate.d_new] if settings.evaluate.d_new is not None else settings.deltas.d_new
    means: dict[tuple[float, int], float] = {}
    for percentile in percentiles:
        for d_new in widths:
            best = [_best(context, layer, percentile, d_new) for layer in context.layers]
            values = [one["figures"]["val_fvu"] for one in best if one is not None]
            if len(values) == len(best):
                means[percentile, d_new] = sum(values) / len(values)
    if not means:
        raise WorkFailed("no (percentile, d_new) has a delta on every layer: " + "; ".join(context.failures))
    return min(means, key=lambda pair: (means[pair], pair))


def evaluate_work(work: Work) -> list[str]:
    """Computes the cells of one piece of work; returns their names."""
    rows = [row for row in read_rows(work.rows) if work.subset in ("", row.label)]
    model = bridge(work.model, work.device, work.precision)
    return {"raw": _raw, "behaviour": _behaviour, "reconstruction": _reconstruction, "exactness": _exactness}[
        work.kind
    ](work, model, rows)


def _raw(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.behaviour import Ask, evaluate_behaviour
    from evaluators.reconstruction import text_cross_entropy

    if not work.subset:
        ce, tokens = text_cross_entropy(model, rows, (), "raw")
        cell = {"kind": "text", "ce_raw": ce, "n_tokens": tokens, "key": work.key, "seconds": 0.0}
        write_json(Path(work.folder) / f"{work.name}.json", cell)
        return [work.name]
    for _, figures, texts in evaluate_behaviour(
        model, rows, (), [Ask("raw")], max_new_tokens=work.max_new_tokens, batch_size=work.batch_size
    ):
        _write_behaviour(work, "raw", None, figures, texts)
    return [f"raw_{work.subset}"]


def _behaviour(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.behaviour import Ask, evaluate_behaviour

    asks = [Ask("alpha", strength) for strength in work.strengths]
    raw = _read_generations(_generations(work) / f"raw_{work.subset}.jsonl")
    names = []
    for ask, figures, texts in evaluate_behaviour(
        model,
        rows,
        _sites(work),
        asks,
        max_new_tokens=work.max_new_tokens,
        batch_size=work.batch_size,
        raw_outputs=[one["tokens"] for one in raw],
    ):
        names.append(_write_behaviour(work, "alpha", ask.alpha, figures, texts))
        # Strengths 0 and 1 are no_delta and full to the last bit (checks.json): measured once, filed twice.
        if ask.alpha == 0.0:
            silent = [{**one, "sum_abs_delta_acts": 0.0} for one in figures]
            names.append(_write_behaviour(work, "no_delta", 0.0, silent, texts))
        if ask.alpha == 1.0:
            names.append(_write_behaviour(work, "full", 1.0, figures, texts))
    return names


def _reconstruction(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.reconstruction import evaluate_reconstruction

    ce_raw = read_json(Path(work.folder) / f"{TEXT_CELL}.json")["ce_raw"]
    names = []
    sites = _sites(work)
    for plan, d_new, figures in zip(
        work.sites, work.d_new, evaluate_reconstruction(model, rows, sites, ce_raw), strict=True
    ):
        cell = {
            "kind": "reconstruction",
            "layer": plan.layer,
            "percentile": work.percentile,
            "d_new": d_new,
            "base": plan.candidate[1],
            "convention": sites[0].base.taps.input,
            "seed": work.seed,
            "key": work.key,
            **figures,
        }
        names.append(f"{work.name}_d{d_new:03d}")
        write_json(Path(work.folder) / f"{names[-1]}.json", cell)
    return names


def _exactness(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.checks import exactness_checks

    chosen: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        chosen[row.label].append(row)
    few = [row for subset in chosen.values() for row in subset[:CHECK_ROWS]]
    sites = _sites(work)
    checks = [
        *exactness_checks(model, few, sites[:1], work.max_new_tokens),
        *(exactness_checks(model, few, sites, work.max_new_tokens) if len(sites) > 1 else []),
    ]
    write_json(Path(work.folder).parent / "checks.json", {"key": work.key, "checks": checks})
    return []


def _sites(work: Work) -> list[Any]:
    from evaluators.interventions import Site
    from models.deltas import read_delta
    from models.gemma_scope import Candidate, read

    return [
        Site(
            plan.layer,
            read(plan.root, Candidate(*plan.candidate), plan.layer).to(work.device),
            read_delta(Path(plan.delta)).to(work.device),
        )
        for plan in work.sites
    ]


def _write_behaviour(work: Work, condition: str, alpha: float | None, figures: list[dict], texts: list[dict]) -> str:
    layers = [plan.layer for plan in work.sites]
    name = f"raw_{work.subset}" if condition == "raw" else f"{work.name}_{_label(condition, alpha)}"
    place = {"layers": layers, "condition": condition, "alpha": alpha, "subset": work.subset}
    cell = {
        "kind": "behaviour",
        **place,
        "percentile": work.percentile,
        "d_new": None if condition in ("raw", "no_delta") else work.d_new[0],
        "convention": "" if condition == "raw" else "ln2.hook_normalized",
        "seed": work.seed,
        "seconds": texts[0]["seconds"] if texts else 0.0,
        "key": work.key,
        "rows": figures,
    }
    lines = [json.dumps({**place, **{k: v for k, v in one.items() if k != "seconds"}}) for one in texts]
    path = _generations(work) / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text("\n".join(lines) + "\n")
    beside.replace(path)
    write_json(Path(work.folder) / f"{name}.json", cell)
    return name


def _label(condition: str, alpha: float | None) -> str:
    return f"alpha{alpha:g}" if condition == "alpha" else condition


def _generations(work: Work) -> Path:
    return Path(work.folder).parent / "generations"


def _read_generations(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _cell_names(work: Work) -> list[str]:
    """The files a piece of work leaves."""
    if work.kind == "raw":
        return [work.name]
    if work.kind == "reconstruction":
        return [f"{work.name}_d{d_new:03d}" for d_new in work.d_new]
    if work.kind == "exactness":
        return []
    names = [f"{work.name}_{_label('alpha', strength)}" for strength in work.strengths]
    names += [f"{work.name}_no_delta"] * (0.0 in work.strengths) + [f"{work.name}_full"] * (1.0 in work.strengths)
    return names


def _compute(context: Context, works: list[Work], label: str) -> None:
    """Runs what is missing, longest first, and tracks every cell that is there."""

    def there(work: Work) -> bool:
        held = [read_json(context.space.cells / f"{name}.json") for name in _cell_names(work)]
        return bool(held) and all(cell is not None and cell["key"] == work.key for cell in held)

    missing = [work for work in works if not there(work)]
    for work in works:
        if work not in missing:
            _track(context, _cell_names(work))
    missing.sort(key=lambda work: -len(work.sites) * max(len(work.strengths), 2))
    with context.progress.bar(label, sum(len(_cell_names(work)) for work in works), "cells") as bar:
        bar.update(sum(len(_cell_names(work)) for work in works if work not in missing))
        if missing:
            for outcome in fan_out(evaluate_work, missing, context.share, context.settings.compute.max_retries):
                if outcome.error:
                    context.failures.append(f"cells {outcome.task.name}: {outcome.error}")
                else:
                    _track(context, outcome.result)
                bar.advance(len(_cell_names(outcome.task)))
    if label == "raw model" and context.failures:
        raise WorkFailed("the raw model could not be evaluated: " + "; ".join(context.failures))


def _track(context: Context, names: list[str]) -> None:
    from evaluators.pooling import cell_metrics

    for name in names:
        cell = read_json(context.space.cells / f"{name}.json")
        record_cell(context, name, cell, cell_metrics(cell))


def _shared(context: Context) -> dict[str, Any]:
    from trainers.precision import resolve_precision

    settings = context.settings
    device = context.device
    # On a CPU bf16 saves nothing that exactness would not miss; it has to be asked for.
    precision = "fp32" if device == "cpu" and settings.compute.precision == "auto" else settings.compute.precision
    return {
        "model": str(context.space.lora / "merged"),
        "folder": str(context.space.cells),
        "rows": str(context.space.data / "evaluation.jsonl"),
        "device": device,
        "precision": resolve_precision(precision, device),
        "max_new_tokens": settings.evaluate.max_new_tokens,
        "batch_size": settings.evaluate.batch_size,
        "seed": settings.seed,
    }


def _raw_work(context: Context) -> list[Work]:
    key = key_of("raw", keys.lora(context.settings), _evaluation_settings(context))
    shared = _shared(context)
    return [
        Work("raw", f"raw_{subset}" if subset else TEXT_CELL, (), subset, (), None, (), key, **shared)
        for subset in [*context.settings.evaluate.subsets, ""]
    ]


def _behaviour_work(context: Context, percentile: float, d_new: int) -> list[Work]:
    settings = context.settings.evaluate
    shared = _shared(context)
    single = [[layer] for layer in context.layers]
    sets = [*single, context.layers] if settings.joint and len(context.layers) > 1 else single
    works = []
    for layers in sets:
        strengths: set[float] = set()
        if "no_delta" in settings.conditions:
            strengths.add(0.0)
        if "full" in settings.conditions:
            strengths.add(1.0)
        if settings.alpha_layers == "all" or set(layers) <= set(settings.alpha_layers):
            strengths |= set(settings.alphas)
        sites = tuple(_site_plan(context, layer, percentile, d_new) for layer in layers)
        for subset in settings.subsets:
            label = "+".join(f"{layer:02d}" for layer in layers)
            name = f"layer_{label}_p{percentile:.2f}_d{d_new:03d}_{subset}"
            key = key_of("cell", _lineage(context, sites), _evaluation_settings(context))
            works.append(
                Work("behaviour", name, sites, subset, tuple(sorted(strengths)), percentile, (d_new,), key, **shared)
            )
    return works


def _reconstruction_work(context: Context) -> list[Work]:
    settings = context.settings.deltas
    shared = _shared(context)
    works = []
    for layer in context.layers:
        for percentile in settings.percentiles:
            widths = [one for one in settings.d_new if _best(context, layer, percentile, one) is not None]
            sites = tuple(_site_plan(context, layer, percentile, d_new) for d_new in widths)
            name = f"reconstruction_layer_{layer:02d}_p{percentile:.2f}"
            key = key_of("reconstruction", _lineage(context, sites), _evaluation_settings(context))
            if sites:
                works.append(Work("reconstruction", name, sites, "", (), percentile, tuple(widths), key, **shared))
    return works


def _exactness_work(context: Context, percentile: float, d_new: int) -> list[Work]:
    sites = tuple(_site_plan(context, layer, percentile, d_new) for layer in context.layers)
    key = key_of("exactness", _lineage(context, sites), _evaluation_settings(context))
    return [Work("exactness", "exactness checks", sites, "", (), percentile, (d_new,), key, **_shared(context))]


def _site_plan(context: Context, layer: int, percentile: float, d_new: int) -> SitePlan:
    base = chosen_base(context, layer, percentile)
    best = _best(context, layer, percentile, d_new)
    assert best is not None
    delta = context.space.deltas / group_name(layer, percentile, d_new) / f"trial_{best['trial']:04d}"
    return SitePlan(layer, root(context), (base.average_l0, base.path), str(delta))


def _best(context: Context, layer: int, percentile: float, d_new: int) -> dict[str, Any] | None:
    return read_json(context.space.folder / DELTAS / group_name(layer, percentile, d_new) / "best.json")


def _lineage(context: Context, sites: tuple[SitePlan, ...]) -> list[Any]:
    """What the sites' weights depend on, without the paths of this machine."""
    return [
        (site.layer, site.candidate, Path(site.delta).name, read_json(Path(site.delta).parent / "key.json"))
        for site in sites
    ]


def _evaluation_settings(context: Context) -> list[Any]:
    settings = context.settings
    return [keys.lora(settings), settings.evaluate.max_new_tokens, settings.compute.precision]

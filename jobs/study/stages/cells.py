"""One piece of evaluation, as a worker computes it: cells that share a model and its sites.

In: a `Work`, which holds only paths and plain values. Out: `cells/NAME.json` and `generations/NAME.jsonl`, each written
under a temporary name and renamed, and their names.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data.rows import read_rows
from jobs.files import read_json, write_json
from jobs.study.stages.work import SitePlan, Work
from jobs.study.stages.worker_memory import bridge, exact_paths, paths, prefixes, reference

CHECK_ROWS = 2
"""Rows of each subset that the exactness checks use."""
RANKING_ROWS = 16
"""Held-out rows of each label on which features are ranked."""
PAIRS = 8192
"""Training pairs that the regression for dense_delta reads at a time."""


def evaluate(work: Work) -> list[str]:
    """Computes the cells of one piece of work; returns their names."""
    subsets = (work.subset,) if work.subset else work.shared.subsets
    rows = [row for row in read_rows(work.shared.rows) if row.label in subsets]
    model = bridge(work.model.folder, work.model.device, work.model.precision)
    return KINDS[work.kind](work, model, rows)


def _raw(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.behaviour import Ask, evaluate_behaviour

    budget = work.shared.max_new_tokens
    ((_, figures, texts),) = evaluate_behaviour(_passes(work, model), (), rows, [Ask("raw")], max_new_tokens=budget)
    if work.conditions[0] == "raw":
        figures = [{**one, "kl": 0.0} for one in figures]
    return [_write_behaviour(work, work.conditions[0], None, figures, texts)]


def _behaviour(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.behaviour import Ask, evaluate_behaviour

    is_base = work.model.folder == work.shared.base_model
    raw = _read_generations(_generations(work) / f"{'base_model_raw' if is_base else 'raw'}_{work.subset}.jsonl")
    settings: dict[str, Any] = {
        "max_new_tokens": work.shared.max_new_tokens,
        "raw_outputs": [one["tokens"] for one in raw],
        "reference": None if is_base else reference(work.model, work.shared.rows, work.subset),
    }
    sites = _sites(work)
    asks = [Ask("alpha", strength) for strength in work.strengths]
    names = []
    for ask, figures, texts in evaluate_behaviour(_kept_passes(work, model), sites, rows, asks, **settings):
        if ask.alpha in work.doses:
            names.append(_write_behaviour(work, "alpha", ask.alpha, figures, texts))
        # Strengths 0 and 1 are no_delta and full to the last bit (checks.json): measured once, filed twice.
        if ask.alpha == 0.0 and "no_delta" in work.conditions:
            silent = [{**one, "sum_abs_delta_acts": 0.0} for one in figures]
            names.append(_write_behaviour(work, "no_delta", 0.0, silent, texts))
        if ask.alpha == 1.0 and "full" in work.conditions:
            names.append(_write_behaviour(work, "full", 1.0, figures, texts))
    for control, alpha in work.asked:
        if control in work.controls:
            with _subject(work, (control, alpha), model, rows, sites) as (passes, spliced):
                asked = evaluate_behaviour(passes, spliced, rows, [Ask(control, alpha)], **settings)
                names += [_write_behaviour(work, control, alpha, figures, texts) for _, figures, texts in asked]
    return names


@contextmanager
def _subject(
    work: Work, asked: tuple[str, float | None], model: Any, rows: list[Any], sites: list[Any]
) -> Iterator[tuple[Any, Any]]:
    """The passes and the sites of a control; nothing is kept of a model whose weights are others for a while."""
    from evaluators.conditions import CONDITIONS
    from evaluators.measures.reconstruction import site_activations
    from evaluators.splice.passes import Prefixes
    from evaluators.splice.sites import SUBSTITUTES, Material
    from models.blocks import exchanged, interpolated

    control, alpha = asked
    condition, plain = CONDITIONS[control], _passes(work, model)
    if condition.substitute:
        raw = replace(plain, prefixes=Prefixes(model, [site.layer for site in sites], sites[0].taps))
        sites = [
            SUBSTITUTES[control](
                site, Material(site_activations(raw, site, rows)[0], partial(_training_pairs, work, plan), work.seed)
            )
            for site, plan in zip(sites, work.sites, strict=True)
        ]
    if condition.model in ("swapped", "scaled"):
        before = paths(work.model, work.shared.base_model, tuple(site.layer for site in sites))
        other = exchanged(model, list(before.values()))
        with other if alpha is None else interpolated(model, list(before.values()), alpha):
            yield plain, sites
    else:
        yield _kept_passes(work, model), sites


def _training_pairs(work: Work, plan: SitePlan) -> Iterator[tuple[Any, Any]]:
    """The pairs the delta was trained on, (x, residual) or (x, change), in batches, on the worker's device."""
    from models.bridge import read_input
    from models.transcoder import CONVENTIONS
    from trainers.activations import read_pairs

    taps = CONVENTIONS[work.model.convention]
    inputs, targets = read_pairs(Path(plan.inputs), ("x",)), read_pairs(Path(plan.targets), (plan.ground.target,))
    for (x,), (target,) in zip(inputs.in_order(PAIRS), targets.in_order(PAIRS), strict=True):
        yield read_input(taps, x.to(work.model.device).float()), target.to(work.model.device).float()


def _reconstruction(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.reconstruction import evaluate_reconstruction

    raw = [read_json(_cell(work, f"raw_{subset}"))["rows"] for subset in work.shared.subsets]
    texts = [row for cell in raw for row in cell]
    ce_raw = sum(row["text_nll"] for row in texts) / sum(row["n_act_tokens"] for row in texts)
    names = []
    asked = evaluate_reconstruction(_kept_passes(work, model), _sites(work), rows, ce_raw)
    for plan, figures in zip(work.sites, asked, strict=True):
        assert plan.candidate is not None
        cell = {"kind": "reconstruction", **_place(work, plan), "base": plan.candidate[1], "key": plan.key, **figures}
        names.append(plan.cell)
        write_json(_cell(work, plan.cell), cell)
    return names


def _change(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.change_fit import evaluate_change

    started = time.perf_counter()
    found = evaluate_change(_passes(work, model), _sites(work), rows)
    layers = [{"layer": plan.layer, "rows": entries} for plan, entries in zip(work.sites, found, strict=True)]
    return _write(work, {"d_new": work.sites[0].d_new, "layers": layers}, started)


def _ranking(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.curve import rank_features

    started = time.perf_counter()
    held_out = list(read_rows(work.shared.ranking_rows))
    labels = dict.fromkeys(row.label for row in held_out)
    chosen = [row for label in labels for row in [one for one in held_out if one.label == label][:RANKING_ROWS]]
    ranked = rank_features(_passes(work, model), _sites(work), chosen)
    return _write(work, {"n_rows": len(chosen), "features": [one._asdict() for one in ranked]}, started)


def _curve(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.curve import Ranked, evaluate_curve

    started = time.perf_counter()
    ranked = [Ranked(**one) for one in read_json(_cell(work, work.ranking))["features"]]
    compared = reference(work.model, work.shared.rows, work.subset)
    found = evaluate_curve(_kept_passes(work, model), _sites(work), rows, ranked, compared)
    counts = [{"k": count, "rows": entries} for count, entries in found.items()]
    return _write(work, {"subset": work.subset, "counts": counts}, started)


def _features(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.features import evaluate_features

    started = time.perf_counter()
    (plan,), (site,) = work.sites, _sites(work)
    found = evaluate_features(
        _kept_passes(work, model),
        site,
        rows,
        ablations=work.shared.ablations,
        max_new_tokens=work.shared.max_new_tokens,
    )
    return _write(work, {**_place(work, plan), "features": found}, started)


def _place(work: Work, plan: SitePlan) -> dict[str, Any]:
    """What names a cell of one site."""
    return {
        "layer": plan.layer,
        "target": plan.ground.target,
        "percentile": plan.ground.percentile,
        "d_new": plan.d_new,
        "convention": work.model.convention,
        "seed": work.seed,
    }


def _write(work: Work, found: dict[str, Any], started: float) -> list[str]:
    """A cell that is all of its piece of work."""
    layers = [plan.layer for plan in work.sites]
    ground = work.sites[0].ground
    cell = {
        "kind": work.kind,
        "target": ground.target,
        "layers": layers,
        "percentile": ground.percentile,
        "d_new": work.sites[0].d_new,
        "seed": work.seed,
        "key": work.key,
        "seconds": time.perf_counter() - started,
        **found,
    }
    write_json(_cell(work, work.name), cell)
    return [work.name]


def _exactness(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.checks import change_checks, exactness_checks

    chosen: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        chosen[row.label].append(row)
    few = [row for subset in chosen.values() for row in subset[:CHECK_ROWS]]
    sites = _sites(work)
    sets = [sites[:1], sites] if len(sites) > 1 else [sites]
    checks = [one for chosen in sets for one in exactness_checks(model, few, chosen, work.shared.max_new_tokens)]
    if work.sites[0].ground.target == "change":
        folders = (work.shared.base_model, work.model.folder)
        layers = tuple(site.layer for site in sites)
        before, after = (exact_paths(work.model, folder, layers) for folder in folders)
        checks += [one for chosen in sets for one in change_checks(model, few, chosen, before, after)]
    write_json(Path(work.shared.cells).parent / f"{work.name}.json", {"key": work.key, "checks": checks})
    return []


def _passes(work: Work, model: Any) -> Any:
    from evaluators.splice.passes import Passes

    return Passes(model, work.shared.batch_size)


def _kept_passes(work: Work, model: Any) -> Any:
    """Passes that reuse what this worker keeps of the raw model at the first spliced layer."""
    return replace(_passes(work, model), prefixes=prefixes(work.model, work.sites[0].layer))


def _sites(work: Work) -> list[Any]:
    from evaluators.splice.interventions import Site
    from models.deltas import read_delta
    from models.gemma_scope import Candidate, read
    from models.transcoder import CONVENTIONS

    taps = CONVENTIONS[work.model.convention]
    layers = tuple(plan.layer for plan in work.sites if plan.candidate is None)
    before = paths(work.model, work.shared.base_model, layers) if layers else {}
    sites = []
    for plan in work.sites:
        base = None if plan.candidate is None else read(plan.root, Candidate(*plan.candidate), plan.layer, taps)
        sites.append(Site(plan.layer, base or before[plan.layer], read_delta(Path(plan.delta))).to(work.model.device))
    return sites


def _write_behaviour(work: Work, condition: str, alpha: float | None, figures: list[dict], texts: list[dict]) -> str:
    from evaluators.conditions import CONDITIONS

    layers = [plan.layer for plan in work.sites]
    name = work.cell_name(condition, alpha)
    place = {"layers": layers, "condition": condition, "alpha": alpha, "subset": work.subset}
    cell = {
        "kind": "behaviour",
        **place,
        "target": work.sites[0].ground.target if work.sites else "",
        "percentile": work.sites[0].ground.percentile if work.sites else None,
        "d_new": work.sites[0].d_new if work.sites and CONDITIONS[condition].uses_delta else None,
        "convention": work.model.convention if work.sites else "",
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
    write_json(_cell(work, name), cell)
    return name


def _cell(work: Work, name: str) -> Path:
    return Path(work.shared.cells) / f"{name}.json"


def _generations(work: Work) -> Path:
    return Path(work.shared.cells).parent / "generations"


def _read_generations(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


KINDS = {
    "raw": _raw,
    "behaviour": _behaviour,
    "reconstruction": _reconstruction,
    "change": _change,
    "ranking": _ranking,
    "curve": _curve,
    "features": _features,
    "exactness": _exactness,
}
"""What a worker does for each kind of work; each function returns the names of the cells it wrote."""

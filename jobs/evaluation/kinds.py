"""One piece of evaluation, as a worker computes it: cells that share a model and its sites.

In: a `Work`, which holds only paths and plain values. Out: `cells/NAME.json` and `generations/NAME.jsonl`, each written
under a temporary name and renamed, and their names.
"""

from __future__ import annotations

import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from data.rows import read_rows, slug
from jobs.capture.worker_memory import bridge, exact_paths, own_paths, reference
from jobs.evaluation import behaviour as behaviour_cells
from jobs.evaluation.work import SitePlan, Work
from jobs.evaluation.worker import cell_file, kept_passes, load_sites, plain_passes
from jobs.files import read_json, write_json

CHECK_ROWS = 1
"""Rows of each subset that the exactness checks use; of each, all logits at all positions are compared."""
RANKING_ROWS = 16
"""Held-out rows of each label on which features are ranked."""
EXACT_LAYERS = 14
"""Layers whose MLPs lie in fp32 at once, beside a model in bf16, which may be a large one."""
CARD_ROWS = 8
"""Rows of each subset on which a feature is ablated, and kept, alone."""


def evaluate(work: Work) -> list[str]:
    """Computes the cells of one piece of work; returns their names."""
    subsets = (work.subset,) if work.subset else work.shared.subsets
    every = read_rows(work.shared.rows)
    rows = [row for subset in subsets for row in every if row.label == subset]
    model = bridge(work.model.folder, work.model.device, work.model.precision)
    return KINDS[work.kind](work, model, rows)


def _reconstruction(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.reconstruction import evaluate_reconstruction

    raw = [read_json(cell_file(work, f"raw_{slug(subset)}"))["rows"] for subset in work.shared.subsets]
    texts = [row for cell in raw for row in cell]
    ce_raw = sum(row["text_nll"] for row in texts) / sum(row["n_act_tokens"] for row in texts)
    names = []
    asked = evaluate_reconstruction(kept_passes(work, model), load_sites(work), rows, ce_raw)
    for plan, figures in zip(work.sites, asked, strict=True):
        assert plan.candidate is not None
        cell = {"kind": "reconstruction", **_place(work, plan), "base": plan.candidate[1], "key": plan.key, **figures}
        names.append(plan.cell)
        write_json(cell_file(work, plan.cell), cell)
    return names


def _change(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.change_fit import evaluate_change

    started, sites, passes = time.perf_counter(), load_sites(work), plain_passes(work, model)
    if work.model.precision == "fp32":
        found = evaluate_change(passes, sites, rows)
    else:
        found = []
        for some in (sites[first : first + EXACT_LAYERS] for first in range(0, len(sites), EXACT_LAYERS)):
            exact_paths.cache_clear()  # before more are read
            layers_of = tuple(site.layer for site in some)
            before, after = (
                exact_paths(work.model, one, layers_of) for one in (work.shared.base_model, work.model.folder)
            )
            found += evaluate_change(passes, some, rows, (before, after))
            del before, after
    layers = [{"layer": plan.layer, "rows": entries} for plan, entries in zip(work.sites, found, strict=True)]
    return _write(work, {"d_new": work.sites[0].d_new, "layers": layers}, started)


def _ranking(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.curve import rank_features
    from evaluators.measures.features import firing_rates

    started = time.perf_counter()
    held_out = list(read_rows(work.shared.ranking_rows))
    labels = dict.fromkeys(row.label for row in held_out)
    chosen = [row for label in labels for row in [one for one in held_out if one.label == label][:RANKING_ROWS]]
    passes, sites = plain_passes(work, model), load_sites(work)
    rates = firing_rates(passes, sites, rows)
    features = [
        {**one._asdict(), "firing_rate": {name: of[one.feature] for name, of in rates[one.layer].items()}}
        for one in rank_features(passes, sites, chosen)
    ]
    return _write(work, {"n_rows": len(chosen), "features": features}, started)


def _curve(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.curve import Ranked, evaluate_curve

    started = time.perf_counter()
    listed = read_json(cell_file(work, work.ranking))["features"]
    ranked = [Ranked(one["layer"], one["feature"], one["effect"]) for one in listed]
    compared = reference(work.model, work.shared.rows, work.shared.batch_size)
    found = evaluate_curve(kept_passes(work, model), load_sites(work), rows, ranked, compared)
    counts = [{"k": count, "rows": entries} for count, entries in found.items()]
    return _write(work, {"subset": work.subset, "counts": counts}, started)


def _cards(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.behaviours import read_behaviours
    from evaluators.measures.features import read_features
    from evaluators.measures.single_features import single_features

    started = time.perf_counter()
    passes, sites = plain_passes(work, model), load_sites(work)
    few = [row for subset in work.shared.subsets for row in [one for one in rows if one.label == subset][:CARD_ROWS]]
    of_change = work.sites[0].ground.target == "change"
    effects = single_features(
        passes,
        sites,
        few,
        work.features,
        limits=work.shared.limits,
        behaviours=read_behaviours(work.shared.behaviours),
        guesses=behaviour_cells.guesses(work, few, "base_model_raw" if of_change else "raw"),
    )
    read = read_features(passes, sites, rows, work.features)
    cards = [
        {"layer": layer, "feature": feature, **read[layer, feature], **effects[layer, feature]}
        for layer, feature in work.features
    ]
    return _write(work, {"convention": work.model.convention, "cards": cards}, started)


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
    write_json(cell_file(work, work.name), cell)
    return [work.name]


def _exactness(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.checks import change_checks, exactness_checks

    chosen: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        chosen[row.label].append(row)
    few = [row for subset in chosen.values() for row in subset[:CHECK_ROWS]]
    sites = load_sites(work)
    sets = [sites[:1], sites] if len(sites) > 1 else [sites]
    checks = [one for chosen in sets for one in exactness_checks(model, few, chosen, work.shared.limits)]
    if work.sites[0].ground.target == "change":
        folders = (work.shared.base_model, work.model.folder)
        layers = tuple(site.layer for site in sites)
        before, after = (own_paths(work.model, folder, layers) for folder in folders)
        checks += [one for chosen in sets for one in change_checks(model, few, chosen, before, after)]
    write_json(Path(work.shared.cells).parent / f"{work.name}.json", {"key": work.key, "checks": checks})
    return []


KINDS = {
    "raw": behaviour_cells.raw,
    "behaviour": behaviour_cells.behaviour,
    "width": behaviour_cells.behaviour,
    "reconstruction": _reconstruction,
    "change": _change,
    "ranking": _ranking,
    "curve": _curve,
    "cards": _cards,
    "exactness": _exactness,
}
"""What a worker does for each kind of work; each function returns the names of the cells it wrote."""

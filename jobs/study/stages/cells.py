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
from functools import partial
from pathlib import Path
from typing import Any

from data.rows import read_rows
from jobs.files import read_json, write_json
from jobs.study.stages.work import SitePlan, Work
from jobs.study.stages.worker_memory import bridge, prefixes

CHECK_ROWS = 2
"""Rows of each subset that the exactness checks use."""
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

    ((_, figures, texts),) = evaluate_behaviour(
        _passes(work, model, kept=False),
        (),
        rows,
        [Ask("raw")],
        max_new_tokens=work.shared.max_new_tokens,
        whole_text=True,
    )
    return [_write_behaviour(work, work.conditions[0], None, figures, texts)]


def _behaviour(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.behaviour import Ask, evaluate_behaviour

    unedited = "base_model_raw" if work.model.folder == work.shared.base_model else "raw"
    raw = _read_generations(_generations(work) / f"{unedited}_{work.subset}.jsonl")
    settings: dict[str, Any] = {
        "max_new_tokens": work.shared.max_new_tokens,
        "raw_outputs": [one["tokens"] for one in raw],
    }
    sites = _sites(work)
    asks = [Ask("alpha", strength) for strength in work.strengths]
    names = []
    for ask, figures, texts in evaluate_behaviour(_passes(work, model), sites, rows, asks, **settings):
        if ask.alpha in work.doses:
            names.append(_write_behaviour(work, "alpha", ask.alpha, figures, texts))
        # Strengths 0 and 1 are no_delta and full to the last bit (checks.json): measured once, filed twice.
        if ask.alpha == 0.0 and "no_delta" in work.conditions:
            silent = [{**one, "sum_abs_delta_acts": 0.0} for one in figures]
            names.append(_write_behaviour(work, "no_delta", 0.0, silent, texts))
        if ask.alpha == 1.0 and "full" in work.conditions:
            names.append(_write_behaviour(work, "full", 1.0, figures, texts))
    for control in work.controls:
        with _subject(work, control, model, rows, sites) as (passes, spliced):
            asked = evaluate_behaviour(passes, spliced, rows, [Ask(control)], **settings)
            names += [_write_behaviour(work, control, None, figures, texts) for _, figures, texts in asked]
    return names


@contextmanager
def _subject(work: Work, control: str, model: Any, rows: list[Any], sites: list[Any]) -> Iterator[tuple[Any, Any]]:
    """The passes and the sites of a control; for a model that differs below the first site, nothing is kept."""
    from evaluators.conditions import CONDITIONS
    from evaluators.measures.reconstruction import site_activations
    from evaluators.splice.sites import SUBSTITUTES, Material
    from models.swap import swapped_mlps

    condition = CONDITIONS[control]
    if condition.substitute:
        plain = _passes(work, model, kept=False)
        sites = [
            SUBSTITUTES[control](
                site, Material(site_activations(plain, site, rows)[0], partial(_training_pairs, work, plan), work.seed)
            )
            for site, plan in zip(sites, work.sites, strict=True)
        ]
    if condition.model == "swapped":
        with swapped_mlps(model, [site.layer for site in sites], Path(work.shared.base_model)):
            yield _passes(work, model, kept=False), sites
    else:
        yield _passes(work, model), sites


def _training_pairs(work: Work, plan: SitePlan) -> Iterator[tuple[Any, Any]]:
    """The (x, residual) pairs the delta was trained on, in batches, on the worker's device."""
    from models.bridge import read_input
    from models.transcoder import CONVENTIONS
    from trainers.activations import read_pairs

    taps = CONVENTIONS[work.model.convention]
    inputs, residuals = read_pairs(Path(plan.inputs), ("x",)), read_pairs(Path(plan.residual), ("residual",))
    for (x,), (residual,) in zip(inputs.in_order(PAIRS), residuals.in_order(PAIRS), strict=True):
        yield read_input(taps, x.to(work.model.device).float()), residual.to(work.model.device).float()


def _reconstruction(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.reconstruction import evaluate_reconstruction

    raw = [read_json(_cell(work, f"raw_{subset}"))["rows"] for subset in work.shared.subsets]
    texts = [row for cell in raw for row in cell]
    ce_raw = sum(row["text_nll"] for row in texts) / sum(row["n_act_tokens"] for row in texts)
    names = []
    asked = evaluate_reconstruction(_passes(work, model), _sites(work), rows, ce_raw)
    for plan, figures in zip(work.sites, asked, strict=True):
        cell = {
            "kind": "reconstruction",
            "layer": plan.layer,
            "percentile": plan.percentile,
            "d_new": plan.d_new,
            "base": plan.candidate[1],
            "convention": work.model.convention,
            "seed": work.seed,
            "key": plan.key,
            **figures,
        }
        names.append(plan.cell)
        write_json(_cell(work, plan.cell), cell)
    return names


def _features(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.features import evaluate_features

    started = time.perf_counter()
    (plan,), (site,) = work.sites, _sites(work)
    found = evaluate_features(
        _passes(work, model),
        site,
        rows,
        ablations=work.shared.ablations,
        max_new_tokens=work.shared.max_new_tokens,
    )
    place = {
        "layer": plan.layer,
        "percentile": plan.percentile,
        "d_new": plan.d_new,
        "convention": work.model.convention,
    }
    seconds = time.perf_counter() - started
    cell = {"kind": "features", **place, "seed": work.seed, "key": work.key, "seconds": seconds, "features": found}
    write_json(_cell(work, work.name), cell)
    return [work.name]


def _exactness(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.checks import exactness_checks

    chosen: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        chosen[row.label].append(row)
    few = [row for subset in chosen.values() for row in subset[:CHECK_ROWS]]
    sites = _sites(work)
    checks = [
        *exactness_checks(model, few, sites[:1], work.shared.max_new_tokens),
        *(exactness_checks(model, few, sites, work.shared.max_new_tokens) if len(sites) > 1 else []),
    ]
    write_json(Path(work.shared.cells).parent / "checks.json", {"key": work.key, "checks": checks})
    return []


def _passes(work: Work, model: Any, kept: bool = True) -> Any:
    """Passes of the model. With `kept`, they reuse what this worker keeps of the raw model at the first spliced layer
    from one piece of work to the next."""
    from evaluators.splice.passes import Passes

    held = prefixes(work.model, work.sites[0].layer) if kept else None
    return Passes(model, work.shared.batch_size, prefixes=held)


def _sites(work: Work) -> list[Any]:
    from evaluators.splice.interventions import Site
    from models.deltas import read_delta
    from models.gemma_scope import Candidate, read
    from models.transcoder import CONVENTIONS

    return [
        Site(
            plan.layer,
            read(plan.root, Candidate(*plan.candidate), plan.layer, CONVENTIONS[work.model.convention]),
            read_delta(Path(plan.delta)),
        ).to(work.model.device)
        for plan in work.sites
    ]


def _write_behaviour(work: Work, condition: str, alpha: float | None, figures: list[dict], texts: list[dict]) -> str:
    from evaluators.conditions import CONDITIONS

    layers = [plan.layer for plan in work.sites]
    name = work.cell_name(condition, alpha)
    place = {"layers": layers, "condition": condition, "alpha": alpha, "subset": work.subset}
    cell = {
        "kind": "behaviour",
        **place,
        "percentile": work.sites[0].percentile if work.sites else None,
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
    "features": _features,
    "exactness": _exactness,
}
"""What a worker does for each kind of work; each function returns the names of the cells it wrote."""

"""One piece of evaluation, as a worker computes it: cells that share a model and its sites.

In: a `Work`, all of it paths and plain values. Out: `cells/NAME.json` and `generations/NAME.jsonl`, each written beside
and renamed, and their names.
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
from typing import Any, NamedTuple

from data.rows import read_rows
from jobs.stages.loaded import bridge, prefixes
from jobs.workspace import read_json, write_json
from models.gemma_scope import selection_label

CHECK_ROWS = 2
"""Rows of each subset in the exactness checks."""
PAIRS = 8192
"""Training pairs that the regression of dense_delta reads at once."""


class SitePlan(NamedTuple):
    """A site as files: where its base and delta lie, and what the delta was trained on. `key` is that of the site's
    reconstruction cell."""

    layer: int
    percentile: float | None
    d_new: int
    root: str
    candidate: tuple[float, str]
    delta: str
    inputs: str
    residual: str
    key: str

    @property
    def cell(self) -> str:
        return f"reconstruction_layer_{self.layer:02d}_{selection_label(self.percentile)}_d{self.d_new:03d}"


class Work(NamedTuple):
    """What a worker is given: sites that share a model, and the cells asked of them."""

    kind: str
    name: str
    sites: tuple[SitePlan, ...]
    subset: str
    conditions: tuple[str, ...]
    doses: tuple[float, ...]
    key: str
    model: str
    base_model: str
    folder: str
    rows: str
    subsets: tuple[str, ...]
    device: str
    precision: str
    max_new_tokens: int
    batch_size: int
    ablations: int
    seed: int
    convention: str

    @property
    def strengths(self) -> tuple[float, ...]:
        """Every alpha that has to be measured: the doses, 0 for no_delta and 1 for full."""
        named = {"no_delta": 0.0, "full": 1.0}
        return tuple(sorted({*self.doses, *(named[one] for one in self.conditions if one in named)}))

    @property
    def controls(self) -> tuple[str, ...]:
        return tuple(one for one in self.conditions if one not in ("no_delta", "full"))

    @property
    def group(self) -> tuple[Any, ...]:
        """Work of one group shares a model and what it computes below the first spliced layer."""
        return (self.model, self.sites[0].layer) if self.sites else (self.model, self.name)


def evaluate(work: Work) -> list[str]:
    """Computes the cells of one piece of work; returns their names."""
    subsets = (work.subset,) if work.subset else work.subsets
    rows = [row for row in read_rows(work.rows) if row.label in subsets]
    model = bridge(work.model, work.device, work.precision)
    return KINDS[work.kind](work, model, rows)


def _raw(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.behaviour import Ask, evaluate_behaviour

    settings: dict[str, Any] = {"max_new_tokens": work.max_new_tokens, "batch_size": work.batch_size}
    ((_, figures, texts),) = evaluate_behaviour(model, rows, (), [Ask("raw")], **settings, whole_text=True)
    return [_write_behaviour(work, work.conditions[0], None, figures, texts)]


def _behaviour(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.behaviour import Ask, evaluate_behaviour

    unedited = "base_model_raw" if work.model == work.base_model else "raw"
    raw = _read_generations(_generations(work) / f"{unedited}_{work.subset}.jsonl")
    settings: dict[str, Any] = {
        "max_new_tokens": work.max_new_tokens,
        "batch_size": work.batch_size,
        "raw_outputs": [one["tokens"] for one in raw],
    }
    sites = _sites(work)
    asks = [Ask("alpha", strength) for strength in work.strengths]
    names = []
    for ask, figures, texts in evaluate_behaviour(model, rows, sites, asks, **settings, prefixes=_prefixes(work)):
        if ask.alpha in work.doses:
            names.append(_write_behaviour(work, "alpha", ask.alpha, figures, texts))
        # Strengths 0 and 1 are no_delta and full to the last bit (checks.json): measured once, filed twice.
        if ask.alpha == 0.0 and "no_delta" in work.conditions:
            silent = [{**one, "sum_abs_delta_acts": 0.0} for one in figures]
            names.append(_write_behaviour(work, "no_delta", 0.0, silent, texts))
        if ask.alpha == 1.0 and "full" in work.conditions:
            names.append(_write_behaviour(work, "full", 1.0, figures, texts))
    for control in work.controls:
        with _subject(work, control, model, rows, sites) as (stood_in, prefixes):
            asked = evaluate_behaviour(model, rows, stood_in, [Ask(control)], **settings, prefixes=prefixes)
            names += [_write_behaviour(work, control, None, figures, texts) for _, figures, texts in asked]
    return names


@contextmanager
def _subject(work: Work, control: str, model: Any, rows: list[Any], sites: list[Any]) -> Iterator[tuple[Any, Any]]:
    """The sites of a control, and the prefixes that hold for it (none where the model below is another one)."""
    from evaluators.interventions import CONDITIONS
    from evaluators.reconstruction import site_activations
    from evaluators.sites import Material
    from models.swap import swapped_mlps

    condition = CONDITIONS[control]
    if condition.stand_in is not None:
        sites = [
            condition.stand_in(
                site, Material(site_activations(model, rows, site)[0], partial(_training_pairs, work, plan), work.seed)
            )
            for site, plan in zip(sites, work.sites, strict=True)
        ]
    if condition.model == "swapped":
        with swapped_mlps(model, [site.layer for site in sites], Path(work.base_model)):
            yield sites, None
    else:
        yield sites, _prefixes(work)


def _training_pairs(work: Work, plan: SitePlan) -> Iterator[tuple[Any, Any]]:
    """(x, residual) of the delta's training, in batches, on the worker's device."""
    from models.bridge import read_input
    from models.transcoder import CONVENTIONS
    from trainers.activations import read_pairs

    taps = CONVENTIONS[work.convention]
    inputs, residuals = read_pairs(Path(plan.inputs), ("x",)), read_pairs(Path(plan.residual), ("residual",))
    for (x,), (residual,) in zip(inputs.in_order(PAIRS), residuals.in_order(PAIRS), strict=True):
        yield read_input(taps, x.to(work.device).float()), residual.to(work.device).float()


def _reconstruction(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.reconstruction import evaluate_reconstruction

    raw = [read_json(Path(work.folder) / f"raw_{subset}.json")["rows"] for subset in work.subsets]
    texts = [row for cell in raw for row in cell]
    ce_raw = sum(row["text_nll"] for row in texts) / sum(row["n_act_tokens"] for row in texts)
    names = []
    asked = evaluate_reconstruction(model, rows, _sites(work), ce_raw, work.batch_size, prefixes=_prefixes(work))
    for plan, figures in zip(work.sites, asked, strict=True):
        cell = {
            "kind": "reconstruction",
            "layer": plan.layer,
            "percentile": plan.percentile,
            "d_new": plan.d_new,
            "base": plan.candidate[1],
            "convention": work.convention,
            "seed": work.seed,
            "key": plan.key,
            **figures,
        }
        names.append(plan.cell)
        write_json(Path(work.folder) / f"{plan.cell}.json", cell)
    return names


def _features(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.features import evaluate_features

    started = time.perf_counter()
    (plan,), (site,) = work.sites, _sites(work)
    found = evaluate_features(
        model,
        rows,
        site,
        ablations=work.ablations,
        max_new_tokens=work.max_new_tokens,
        batch_size=work.batch_size,
        prefixes=_prefixes(work),
    )
    place = {"layer": plan.layer, "percentile": plan.percentile, "d_new": plan.d_new, "convention": work.convention}
    seconds = time.perf_counter() - started
    cell = {"kind": "features", **place, "seed": work.seed, "key": work.key, "seconds": seconds, "features": found}
    write_json(Path(work.folder) / f"{work.name}.json", cell)
    return [work.name]


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


def _prefixes(work: Work) -> Any:
    """What this worker keeps of the raw model at the first spliced layer, from one piece of work to the next."""
    return prefixes(work.model, work.device, work.precision, work.sites[0].layer, work.convention)


def _sites(work: Work) -> list[Any]:
    from evaluators.interventions import Site
    from models.deltas import read_delta
    from models.gemma_scope import Candidate, read
    from models.transcoder import CONVENTIONS

    return [
        Site(
            plan.layer,
            read(plan.root, Candidate(*plan.candidate), plan.layer, CONVENTIONS[work.convention]),
            read_delta(Path(plan.delta)),
        ).to(work.device)
        for plan in work.sites
    ]


def _write_behaviour(work: Work, condition: str, alpha: float | None, figures: list[dict], texts: list[dict]) -> str:
    from evaluators.interventions import CONDITIONS

    layers = [plan.layer for plan in work.sites]
    name = f"{work.name}_{_label(condition, alpha)}" if work.sites else work.name
    place = {"layers": layers, "condition": condition, "alpha": alpha, "subset": work.subset}
    cell = {
        "kind": "behaviour",
        **place,
        "percentile": work.sites[0].percentile if work.sites else None,
        "d_new": work.sites[0].d_new if work.sites and CONDITIONS[condition].uses_delta else None,
        "convention": work.convention if work.sites else "",
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
    return f"alpha{alpha!r}" if condition == "alpha" else condition


def _generations(work: Work) -> Path:
    return Path(work.folder).parent / "generations"


def _read_generations(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def cells_of(work: Work) -> dict[str, str]:
    """The files a piece of work leaves, and the key each must hold."""
    if work.kind in ("raw", "features"):
        return {work.name: work.key}
    if work.kind == "reconstruction":
        return {plan.cell: plan.key for plan in work.sites}
    if work.kind == "exactness":
        return {}
    labels = [*(_label("alpha", dose) for dose in work.doses), *work.conditions]
    return {f"{work.name}_{label}": work.key for label in labels}


def without_cells(work: Work, done: set[str]) -> Work:
    """The same work less the cells that are there."""
    if work.kind == "reconstruction":
        return work._replace(sites=tuple(plan for plan in work.sites if plan.cell not in done))
    return work._replace(
        doses=tuple(dose for dose in work.doses if f"{work.name}_{_label('alpha', dose)}" not in done),
        conditions=tuple(one for one in work.conditions if f"{work.name}_{one}" not in done),
    )


KINDS = {
    "raw": _raw,
    "behaviour": _behaviour,
    "reconstruction": _reconstruction,
    "features": _features,
    "exactness": _exactness,
}
"""What a worker does for each kind of work; each gives the names of the cells it wrote."""

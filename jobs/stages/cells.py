"""One piece of evaluation, as a worker computes it: cells that share a model and its sites.

In: a `Work`, all of it paths and plain values. Out: `cells/NAME.json` and `generations/NAME.jsonl`, each written beside
and renamed, and their names.
"""

from __future__ import annotations

import json
import os
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

from data.rows import read_rows
from jobs.stages.loaded import bridge
from jobs.workspace import read_json, write_json

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
    conditions: tuple[str, ...]
    doses: tuple[float, ...]
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
    convention: str

    @property
    def strengths(self) -> tuple[float, ...]:
        """Every alpha that has to be measured: the doses, 0 for no_delta and 1 for full."""
        named = {"no_delta": 0.0, "full": 1.0}
        return tuple(sorted({*self.doses, *(named[condition] for condition in self.conditions)}))


def evaluate(work: Work) -> list[str]:
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
        if ask.alpha in work.doses:
            names.append(_write_behaviour(work, "alpha", ask.alpha, figures, texts))
        # Strengths 0 and 1 are no_delta and full to the last bit (checks.json): measured once, filed twice.
        if ask.alpha == 0.0 and "no_delta" in work.conditions:
            silent = [{**one, "sum_abs_delta_acts": 0.0} for one in figures]
            names.append(_write_behaviour(work, "no_delta", 0.0, silent, texts))
        if ask.alpha == 1.0 and "full" in work.conditions:
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
    layers = [plan.layer for plan in work.sites]
    name = f"raw_{work.subset}" if condition == "raw" else f"{work.name}_{_label(condition, alpha)}"
    place = {"layers": layers, "condition": condition, "alpha": alpha, "subset": work.subset}
    cell = {
        "kind": "behaviour",
        **place,
        "percentile": work.percentile,
        "d_new": None if condition in ("raw", "no_delta") else work.d_new[0],
        "convention": "" if condition == "raw" else work.convention,
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


def cell_names(work: Work) -> list[str]:
    """The files a piece of work leaves."""
    if work.kind == "raw":
        return [work.name]
    if work.kind == "reconstruction":
        return [f"{work.name}_d{d_new:03d}" for d_new in work.d_new]
    if work.kind == "exactness":
        return []
    doses = [f"{work.name}_{_label('alpha', dose)}" for dose in work.doses]
    return doses + [f"{work.name}_{condition}" for condition in work.conditions]


def without_cells(work: Work, done: set[str]) -> Work:
    """The same work less the behaviour cells that are there; other kinds are computed as a whole."""
    return work._replace(
        doses=tuple(dose for dose in work.doses if f"{work.name}_{_label('alpha', dose)}" not in done),
        conditions=tuple(one for one in work.conditions if f"{work.name}_{one}" not in done),
    )

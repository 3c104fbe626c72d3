"""What a piece of evaluation works on, as a worker loads it: passes of the model, sites, and where its cells go.

In: a `Work`. Out: passes, sites and paths.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from jobs.capture.worker_memory import paths, prefixes
from jobs.evaluation.work import Work


def plain_passes(work: Work, model: Any) -> Any:
    from evaluators.splice.passes import Passes

    return Passes(model, work.shared.batch_size)


def kept_passes(work: Work, model: Any) -> Any:
    """Passes that reuse what this worker keeps of the raw model at the first spliced layer."""
    return replace(plain_passes(work, model), prefixes=prefixes(work.model, work.sites[0].layer))


def load_sites(work: Work) -> list[Any]:
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


def cell_file(work: Work, name: str) -> Path:
    return Path(work.shared.cells) / f"{name}.json"

"""Behaviour cells, as a worker computes them: one subset under raw, the conditions, the strengths and the controls.

In: a `Work`, the model and rows. Out: `cells/NAME.json` and `generations/NAME.jsonl`, each written under a temporary
name and renamed, and their names.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from data.rows import sha256_of, slug
from jobs.capture.worker_memory import exact_paths, paths, reference
from jobs.evaluation.work import SitePlan, Work
from jobs.evaluation.worker import cell_file, kept_passes, load_sites, plain_passes
from jobs.files import write_json


def raw(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from evaluators.measures.behaviour import Ask, Known, evaluate_behaviour
    from evaluators.measures.behaviours import AGREES, read_behaviours

    behaviours = read_behaviours(work.shared.behaviours)
    is_raw = work.conditions[0] == "raw"
    known = Known(reference=_reference(work)) if is_raw else Known()
    ((_, figures, texts),) = evaluate_behaviour(
        plain_passes(work, model),
        (),
        rows,
        [Ask("raw")],
        limits=work.shared.limits,
        behaviours=behaviours,
        known=known,
    )
    if is_raw:
        figures = [{**one, "kl": 0.0, "behaviours": {**one["behaviours"], AGREES: True}} for one in figures]
    return [_write_behaviour(work, work.conditions[0], None, figures, texts)]


def behaviour(work: Work, model: Any, rows: list[Any]) -> list[str]:
    from data.encoding import encode_row
    from evaluators.measures.behaviour import Ask, Known, evaluate_behaviour
    from evaluators.measures.behaviours import read_behaviours

    is_base = work.model.folder == work.shared.base_model
    of_change = work.sites[0].ground.target == "change"
    finetuned, unfinetuned = (_outputs(work, name) for name in ("raw", "base_model_raw"))
    compared = None if is_base else _reference(work)
    if compared is not None:  # now: a control may exchange the model's weights
        compared.add([encode_row(model.tokenizer, row) for row in rows])
    settings: dict[str, Any] = {
        "limits": work.shared.limits,
        "behaviours": read_behaviours(work.shared.behaviours),
        "known": Known(
            unfinetuned if is_base else finetuned,
            unfinetuned if of_change else [],
            compared,
            finetuned,
        ),
    }
    sites = load_sites(work)
    asks = [Ask("alpha", strength) for strength in work.strengths]
    names = []
    for ask, figures, texts in evaluate_behaviour(kept_passes(work, model), sites, rows, asks, **settings):
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


def _reference(work: Work) -> Any:
    return reference(work.model, work.shared.rows, work.shared.batch_size)


@contextmanager
def _subject(
    work: Work, asked: tuple[str, float | None], model: Any, rows: list[Any], sites: list[Any]
) -> Iterator[tuple[Any, Any]]:
    """The passes and the sites of a control; nothing is kept of a model whose weights are others for a while."""
    from evaluators.conditions import CONDITIONS
    from evaluators.measures.reconstruction import site_activations
    from evaluators.splice.passes import Prefixes
    from evaluators.splice.substitutes import SUBSTITUTES, Material
    from models.blocks import exchanged, interpolated

    control, alpha = asked
    condition, plain = CONDITIONS[control], plain_passes(work, model)
    if condition.substitute:
        raw = replace(plain, prefixes=Prefixes(model, [site.layer for site in sites], sites[0].taps))
        sites = [
            SUBSTITUTES[control](
                site,
                Material(
                    site_activations(raw, site, rows)[0],
                    partial(_moments, plan),
                    work.seed,
                    partial(_true_change, work, plan.layer) if plan.ground.target == "change" else None,
                ),
            )
            for site, plan in zip(sites, work.sites, strict=True)
        ]
    if condition.model in ("swapped", "scaled"):
        before = paths(work.model, work.shared.base_model, tuple(site.layer for site in sites))
        other = exchanged(model, list(before.values()))
        with other if alpha is None else interpolated(model, list(before.values()), alpha):
            yield plain, sites
    else:
        yield kept_passes(work, model), sites


def _true_change(work: Work, layer: int) -> Any:
    """What finetuning changed in the layer's MLP, computed by both."""
    from evaluators.splice.sites import TrueChange

    layers = tuple(plan.layer for plan in work.sites)
    before, after = (exact_paths(work.model, one, layers) for one in (work.shared.base_model, work.model.folder))
    return TrueChange(before[layer], after[layer])


def _moments(plan: SitePlan) -> Any:
    """Those of what the delta was trained on, x and residual or change."""
    from safetensors.torch import load_file

    from evaluators.splice.moments import Moments

    return Moments(**load_file(plan.moments))


def _write_behaviour(work: Work, condition: str, alpha: float | None, figures: list[dict], texts: list[dict]) -> str:
    from evaluators.conditions import CONDITIONS
    from evaluators.measures.behaviours import AGREES

    layers = [plan.layer for plan in work.sites]
    name = work.cell_name(condition, alpha)
    place = {"layers": layers, "condition": condition, "alpha": alpha, "subset": work.subset}
    lines = [json.dumps({**place, **{k: v for k, v in one.items() if k != "seconds"}}) for one in texts]
    path = generations_folder(work) / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    beside.write_text("\n".join(lines) + "\n")
    beside.replace(path)
    cell = {
        "kind": "width" if work.kind == "width" else "behaviour",
        **place,
        "target": work.sites[0].ground.target if work.sites else "",
        "percentile": work.sites[0].ground.percentile if work.sites else None,
        "d_new": work.sites[0].d_new if work.sites and CONDITIONS[condition].uses_delta else None,
        "convention": work.model.convention if work.sites else "",
        "seed": work.seed,
        "strengths": [] if condition in work.controls else work.strengths,
        "seconds": texts[0]["seconds"] if texts else 0.0,
        "key": work.key,
        "behaviours": [*work.shared.behaviours, AGREES],
        "generations": sha256_of(path),
        "rows": figures,
    }
    write_json(cell_file(work, name), cell)
    return name


def generations_folder(work: Work) -> Path:
    return Path(work.shared.cells).parent / "generations"


def guesses(work: Work, rows: list[Any], ground: str) -> dict[str, list[list[int]]]:
    """What the first rows of each subset may be answered with under full and no_delta: as the finetuned model did, and
    as the unedited model `ground`; an empty guess where that was not asked."""
    found: dict[str, list[list[int]]] = {}
    for condition, name in (("full", "raw"), ("no_delta", ground)):
        left = {subset: iter(_outputs(work, name, subset)) for subset in work.shared.subsets}
        found[condition] = [next(left[row.label], []) for row in rows]
    return found


def _outputs(work: Work, name: str, subset: str = "") -> list[list[int]]:
    """What an unedited model wrote on the subset, as tokens; nothing where it was not asked."""
    path = generations_folder(work) / f"{name}_{slug(subset or work.subset)}.jsonl"
    return [json.loads(line)["tokens"] for line in path.read_text().splitlines()] if path.is_file() else []

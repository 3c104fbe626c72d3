"""Stage 6, report: tables, graphs and report.html from everything the sweep wrote to disk.

In: cells, trials, checks and manifests. Out: `report/`, also uploaded to the sweep's MLflow run.
"""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jobs.files import MANIFEST, read_json
from jobs.progress import clock
from jobs.study.context import Context
from jobs.study.stages.deltas import STAGE as DELTAS
from jobs.study.stages.deltas import group_name
from jobs.study.stages.lora import STAGE as LORA
from jobs.study.stages.lora import VALIDATION_FILE, study_name
from jobs.study.stages.transcoders import chosen_base, root

LIBRARIES = ("torch", "transformers", "transformer-lens", "peft", "ray", "optuna", "mlflow")
RAW_LIMITS = (
    ("tool", "tool_call_rate", ">=", 0.95),
    ("tool", "math_correct_rate", ">=", 0.9),
    ("copy", "tool_call_rate", "<=", 0.05),
)
"""What the finetuned model must do before anything about its internals means much."""


def run(context: Context) -> dict[str, Any]:
    from evaluators.report.report import SweepData, write_report
    from jobs.search.pictures import study_pictures

    space = context.space
    deltas = delta_trials(context)
    found = checks(context, deltas)
    data = SweepData(
        cells=load_cells(context),
        lora_trials=lora_trials(context),
        base_transcoders=base_transcoders(context),
        delta_trials=deltas,
        checks=found,
        facts=facts(context),
        generations=generations(context),
        finetuned=read_json(space.lora / VALIDATION_FILE),
        lora_pictures=study_pictures(study_name(context.settings), context.studies, LORA, "val_loss"),
    )
    path = write_report(space.report, data, seed=context.settings.seed)
    context.tracker.artifacts("sweep", space.report)
    context.tracker.artifacts("sweep", space.generations, "generations")
    return {"report": str(path.relative_to(space.folder)), "checks": found}


def load_cells(context: Context) -> list[dict[str, Any]]:
    """The cells of these settings; cells left over from earlier settings are not shown."""
    names = read_json(context.space.cells / MANIFEST)["cells"]
    return [read_json(context.space.cells / f"{name}.json") for name in names]


def lora_trials(context: Context) -> list[dict[str, Any]]:
    return [
        {
            "trial": one["trial"],
            "state": one["state"],
            "value": one["value"],
            "step": one["figures"].get("step"),
            "seconds": one["seconds"],
            **{f"lora.{name}": value for name, value in one["params"].items()},
        }
        for one in _results(context.space.lora)
    ]


def base_transcoders(context: Context) -> list[dict[str, Any]]:
    """One row for each (layer, percentile): the base that was chosen, and its figures if it was trained here."""
    rows = []
    for layer in context.layers:
        for percentile in context.settings.deltas.selections:
            base = chosen_base(context, layer, percentile)
            trained = read_json(Path(root(context)) / base.path / "config.json") or {}
            names = ("target_l0", "val_l0", "val_fvu", "dead_fraction", "revived", "tokens")
            figures = {name: trained[name] for name in names if name in trained}
            rows.append({"layer": layer, "percentile": percentile, "path": base.path, **figures})
    return rows


def delta_trials(context: Context) -> list[dict[str, Any]]:
    from jobs.search.studies import pareto_front

    rows = []
    section = context.settings.deltas
    for layer in context.layers:
        for percentile in section.selections:
            for d_new in section.d_new:
                folder = context.space.folder / DELTAS / group_name(layer, percentile, d_new)
                best = read_json(folder / "best.json")
                objectives = tuple(section.objectives.split(", "))
                front = pareto_front(_results(folder), objectives) if len(objectives) > 1 else None
                for one in _results(folder):
                    rows.append(
                        {
                            "layer": layer,
                            "percentile": percentile,
                            "d_new": d_new,
                            "trial": one["trial"],
                            "state": one["state"],
                            **one["figures"],
                            **one["params"],
                            "seconds": one["seconds"],
                            "best": best is not None and one["trial"] == best["trial"],
                            **({"pareto": one["trial"] in front} if front is not None else {}),
                        }
                    )
    return rows


def checks(context: Context, deltas: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checks on the sweep's own numbers: the finetuned model's behaviour, the deltas' fit, exactness."""
    from evaluators.tables.tables import conditions_table

    found = []
    raw = conditions_table(load_cells(context), seed=context.settings.seed)
    raw = raw[raw["condition"] == "raw"].set_index("subset")
    for subset, metric, relation, limit in RAW_LIMITS:
        if subset not in raw.index:
            continue
        row = raw.loc[subset]
        passed = row[metric] >= limit if relation == ">=" else row[metric] <= limit
        detail = f"{row[metric]:.3f} [{row[f'{metric}_low']:.3f}, {row[f'{metric}_high']:.3f}], n = {row['n_examples']}"
        name = f"the finetuned model on {subset}: {metric} {relation} {limit}"
        found.append({"name": name, "passed": bool(passed), "detail": detail})
    kept = [one for one in deltas if one["best"]]
    better = [one for one in kept if one["val_fvu"] < one["val_fvu_base"]]
    found.append(
        {
            "name": "every kept delta lowers the FVU of its base on held-out text",
            "passed": bool(kept) and len(better) == len(kept),
            "detail": f"{len(better)} of {len(kept)}",
        }
    )
    found.append(_wider_is_no_worse(kept))
    exactness = read_json(context.space.folder / "checks.json") or {"key": None}
    if exactness["key"] == read_json(context.space.cells / MANIFEST)["exactness"]:
        found += exactness["checks"]
    else:
        found.append({"name": "exactness checks", "passed": False, "detail": "they could not be computed"})
    return found


def _wider_is_no_worse(kept: list[dict[str, Any]]) -> dict[str, Any]:
    """A wider delta's FVU may exceed a narrower one's by no more than the seed spreads of the two together."""
    worse, compared = [], 0
    for one in kept:
        for other in kept:
            same = (one["layer"], one["percentile"]) == (other["layer"], other["percentile"])
            if not same or one["d_new"] >= other["d_new"]:
                continue
            compared += 1
            spread = sum(max(x["val_fvu_replicas"]) - min(x["val_fvu_replicas"]) for x in (one, other))
            if other["val_fvu"] > one["val_fvu"] + spread:
                worse.append(f"layer {one['layer']} p{one['percentile']}: d{other['d_new']} above d{one['d_new']}")
    return {
        "name": "a wider delta is not worse than a narrower one beyond their seeds' spread",
        "passed": not worse,
        "detail": "; ".join(worse) or f"{compared} comparisons",
    }


def facts(context: Context) -> dict[str, str]:
    settings, space = context.settings, context.space
    chosen = read_json(space.cells / MANIFEST)
    stages = {name: read_json(getattr(space, folder) / MANIFEST) for name, folder in STAGE_FOLDERS.items()}
    seconds = {name: manifest["seconds"] for name, manifest in stages.items() if manifest and "seconds" in manifest}
    leaks = read_json(space.data / "report.json")["leakage"]
    return {
        "sweep": settings.name,
        "model": settings.model.source,
        "base transcoders": settings.transcoders.source,
        "layers": ", ".join(map(str, context.layers)),
        "spliced for behaviour": f"percentile {chosen['percentile']}, d_new {chosen['d_new']} (lowest mean val_fvu)"
        if settings.evaluate.percentile is None or settings.evaluate.d_new is None
        else f"percentile {chosen['percentile']}, d_new {chosen['d_new']} (as set)",
        "seed": str(settings.seed),
        "leakage check": json.dumps(leaks)[:300],
        "time by stage": ", ".join(f"{name} {clock(value)}" for name, value in seconds.items()),
        "machine": f"{platform.machine()}, {context.share.at_once} workers of {context.share.cpus} CPU"
        + (f" and {context.share.gpus:g} GPU" if context.share.gpus else ""),
        "versions": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        "git commit": str((read_json(space.folder / "versions.json") or {}).get("git commit", "unknown")),
    }


STAGE_FOLDERS = {
    "data": "data",
    "lora": "lora",
    "transcoders": "transcoders",
    "deltas": "deltas",
    "evaluate": "cells",
}


def generations(context: Context) -> list[dict[str, Any]]:
    names = read_json(context.space.cells / MANIFEST)["cells"]
    rows: list[dict[str, Any]] = []
    for name in names:
        path = context.space.generations / f"{name}.jsonl"
        if path.is_file():
            rows += [json.loads(line) for line in path.read_text().splitlines()]
    return rows


def _results(folder: Path) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted(folder.glob("trial_*/result.json"))]

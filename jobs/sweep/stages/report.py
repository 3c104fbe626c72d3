"""Stage 6, report: tables, graphs and report.html from everything the sweep wrote to disk.

In: cells, trials, checks and manifests. Out: `report/`, also uploaded to the sweep's MLflow run.
"""

from __future__ import annotations

import json
import platform
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.capture.bases import base_folder, chosen_base
from jobs.cluster.connection import Share
from jobs.context.context import Context, error_name
from jobs.context.workspace import SETTINGS, VALIDATION_FILE
from jobs.evaluation.behaviour import UNFINETUNED
from jobs.evaluation.kinds import checks_file
from jobs.files import MANIFEST, read_json
from jobs.progress import clock
from jobs.sweep.finetuned import merge_check
from jobs.sweep.stages.data import notes_of
from jobs.sweep.stages.lora import STAGE as LORA
from jobs.sweep.stages.lora import study_name
from sites import Address, Ground, Site, sites_label

if TYPE_CHECKING:
    import pandas as pd

    from evaluators.tables.tables import Results
    from search_spaces.sections import Expected

SAME_CE, SAME_CE_IN_BF16 = 1e-4, 5e-3
"""Allowed difference in nats per token between two computations of the same model, in fp32 and in bf16."""
LIBRARIES = ("torch", "transformers", "transformer-lens", "peft", "ray", "optuna", "mlflow")


def run(context: Context) -> dict[str, Any]:
    from evaluators.report.report import SweepData, write_report
    from evaluators.tables.recovery import headlines
    from evaluators.tables.tables import all_tables

    space, seed = context.space, context.settings.seed
    deltas, results = delta_trials(context), all_tables(context.cells, seed=seed)
    found = checks(context, deltas, results.conditions)
    data = SweepData(
        cells=context.cells,
        results=results,
        lora_trials=lora_trials(context),
        base_transcoders=base_transcoders(context),
        delta_trials=deltas,
        checks=found,
        facts=facts(context),
        generations=generations(context),
        pair=pair(context),
        rest=bool(context.rest),
        polished=polished(context),
        finetuned=read_json(space.lora / VALIDATION_FILE),
        lora_pictures=_lora_pictures(context),
    )
    path = write_report(space.report, data, seed=seed)
    shutil.copy(space.folder / SETTINGS, space.report)  # so that MLflow has the settings with the tables
    context.tracker.log("sweep", headlines(results.gaps, results.recovered, results.curve))
    context.tracker.artifacts("sweep", space.report)
    context.tracker.artifacts("sweep", space.generations, "generations")
    return {"report": str(path.relative_to(space.folder)), "checks": found, "summary": summary(results)}


def summary(results: Results) -> dict[str, list[Any]]:
    """The short table at the end of a sweep, as text: its `columns` and `rows`."""
    from evaluators.report.report import summary_table

    rows = summary_table(results)
    return {"columns": list(rows[0]) if rows else [], "rows": [list(row.values()) for row in rows]}


def _lora_pictures(context: Context) -> dict[str, bytes]:
    """Plots of the LoRA study, if there was one."""
    from jobs.search.pictures import study_pictures

    if context.settings.model.finetuned:
        return {}
    return study_pictures(study_name(context.settings), context.studies, LORA, "val_loss")


def headlines(context: Context) -> dict[str, float]:
    """The figures for comparing sweeps, logged to the sweep's own run in MLflow."""
    from evaluators.tables import recovery

    cells, seed = context.cells, context.settings.seed
    gaps, recovered = (make(cells, seed=seed) for make in (recovery.gap_table, recovery.recovered_table))
    return recovery.headlines(gaps, recovered, recovery.curve_table(cells, seed=seed))


def lora_trials(context: Context) -> list[dict[str, Any]]:
    return [
        {
            "trial": result["trial"],
            "state": result["state"],
            "value": result["value"],
            "step": result["figures"].get("step"),
            "seconds": result["seconds"],
            **{f"lora.{name}": value for name, value in result["params"].items()},
        }
        for result in _results(context.space.lora)
    ]


def base_transcoders(context: Context) -> list[dict[str, Any]]:
    """One row for each (layer, percentile): the chosen base, and its figures if it was trained here."""
    rows = []
    here = context.settings.transcoders.source == "train"
    for site in context.sites_of("residual"):
        manifest = read_json(base_folder(context, site) / MANIFEST) if here else None
        trained = {base["path"]: base for base in manifest["bases"]} if manifest else {}
        for percentile in context.settings.deltas.selections:
            base = chosen_base(context, site, percentile)
            names = ("target_l0", "val_l0", "val_fvu", "dead_fraction", "revived", "tokens")
            known = trained.get(base.path, {})
            figures = {name: known[name] for name in names if name in known}
            rows.append({"layer": site.layer, "percentile": percentile, "path": base.path, **figures})
    return rows


def delta_trials(context: Context) -> list[dict[str, Any]]:
    from jobs.search.studies import pareto_front

    rows = []
    section = context.settings.deltas
    for group in context.delta_groups:
        folder = context.space.deltas / group.folder
        best = read_json(folder / "best.json")
        objectives = tuple(section.objectives.replace("val_error", error_name(group.ground.target)).split(", "))
        front = pareto_front(_results(folder), objectives) if len(objectives) > 1 else None
        for result in _results(folder):
            rows.append(
                {
                    "target": group.ground.target,
                    "layer": group.site.key,
                    "percentile": group.ground.percentile,
                    "d_new": group.d_new,
                    "trial": result["trial"],
                    "state": result["state"],
                    **result["figures"],
                    **result["params"],
                    "val_fvu_base_unfinetuned": _before(context, group),
                    "seconds": result["seconds"],
                    "best": best is not None and result["trial"] == best["trial"],
                    **({"pareto": result["trial"] in front} if front is not None else {}),
                }
            )
    return rows


def _before(context: Context, group: Address) -> float | None:
    """The error of a residual delta's base on the un-finetuned model's output, on held-out text."""
    found = read_json((context.space.deltas / group.folder).parent / "base_error.json")
    return (found or {}).get("val_fvu_base_unfinetuned")


def checks(context: Context, deltas: list[dict[str, Any]], conditions: pd.DataFrame) -> list[dict[str, Any]]:
    """Checks on the sweep's own numbers: the finetuned model's behaviour, the deltas' fit, exactness. `conditions` is
    the table of that name."""
    raw = conditions[conditions["condition"] == "raw"].set_index("subset")
    found = [_expected(rate, raw) for rate in context.settings.evaluate.expected if rate.subset in raw.index]
    kept = [trial for trial in deltas if trial["best"]]
    if context.adopted is not None and (merge := (read_json(context.space.lora / VALIDATION_FILE) or {}).get("merge")):
        found.append(merge_check(merge))
    found += _fits(kept)
    found.append(_wider_is_no_worse(kept))
    found += _alpha_0_is_the_unfinetuned_model(context)
    for name, key in read_json(context.space.cells / MANIFEST)["exactness"].items():
        exactness = read_json(checks_file(context.space.cells, name)) or {"key": None}
        if exactness["key"] == key:
            found += exactness["checks"]
        else:
            found.append({"name": f"exactness: {name}", "passed": False, "detail": "they could not be computed"})
    return found


def _alpha_0_is_the_unfinetuned_model(context: Context) -> list[dict[str, Any]]:
    """If the deltas' sites are all that finetuning changed, alpha 0 must give the cross-entropy of the plain
    un-finetuned model."""
    ends: dict[str, dict[str, float]] = {}
    for cell in context.cells:
        if cell["kind"] == "behaviour" and cell["condition"] in (UNFINETUNED, "no_delta"):
            everything = context.is_everything([Site.parse(key) for key in cell["layers"]])
            if cell["condition"] == UNFINETUNED or (cell["target"] == "change" and everything):
                tokens = sum(row["n_tokens"] for row in cell["rows"])
                ce = sum(row["nll"] for row in cell["rows"]) / tokens
                ends.setdefault(cell["subset"], {})[cell["condition"]] = ce
    apart = {name: abs(two["no_delta"] - two[UNFINETUNED]) for name, two in ends.items() if len(two) == 2}
    if not apart:
        return []
    most = max(apart, key=apart.__getitem__)
    within = SAME_CE_IN_BF16 if context.settings.model.dtype == "bf16" else SAME_CE
    return [
        {
            "name": "alpha 0 at all sites gives the cross-entropy of the un-finetuned model on every subset",
            "passed": apart[most] <= within,
            "detail": f"largest difference: {apart[most]:.2g} nats a token, on {most}; allowed {within:g}",
        }
    ]


def _expected(rate: Expected, raw: pd.DataFrame) -> dict[str, Any]:
    """Whether the finetuned model does what the settings expect of it."""
    row, metric = raw.loc[rate.subset], f"{rate.behaviour}_rate"
    value, bound = row[metric], f">= {rate.at_least:g}" if rate.at_most is None else f"<= {rate.at_most:g}"
    passed = value >= rate.at_least if rate.at_most is None else value <= rate.at_most
    count = int(row[f"n_{rate.behaviour}"])
    detail = f"{value:.3f} [{row[f'{metric}_low']:.3f}, {row[f'{metric}_high']:.3f}], n = {count}"
    if not count:
        detail = f"{rate.behaviour} is not defined on any of its {row['n_examples']} prompts"
    return {"name": f"the finetuned model on {rate.subset}: {metric} {bound}", "passed": bool(passed), "detail": detail}


def _fits(kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Checks that each delta explains part of its training target on held-out text."""
    names = {
        "change": ("every kept change delta explains part of its site's change on held-out text", lambda trial: 1.0),
        "residual": ("every kept residual delta lowers the FVU of its base", lambda trial: trial["val_fvu_base"]),
    }
    found = []
    for target, (name, alone) in names.items():
        here = [trial for trial in kept if trial["target"] == target]
        better = [trial for trial in here if trial[error_name(target)] < alone(trial)]
        if here:
            passed = len(better) == len(here)
            found.append({"name": name, "passed": passed, "detail": f"{len(better)} of {len(here)}"})
    return found


def _wider_is_no_worse(kept: list[dict[str, Any]]) -> dict[str, Any]:
    """Checks that a wider delta's error exceeds a narrower one's by at most the sum of their seed spreads."""
    worse, compared = [], 0
    for narrow in kept:
        name = error_name(narrow["target"])
        for wide in kept:
            same = all(narrow[key] == wide[key] for key in ("target", "layer", "percentile"))
            if not same or narrow["d_new"] >= wide["d_new"]:
                continue
            compared += 1
            spread = sum(max(x[f"{name}_replicas"]) - min(x[f"{name}_replicas"]) for x in (narrow, wide))
            if wide[name] > narrow[name] + spread:
                where = f"layer {narrow['layer']} {Ground(narrow['target'], narrow['percentile']).label}"
                worse.append(f"{where}: d{wide['d_new']} above d{narrow['d_new']}")
    return {
        "name": "a wider delta is not worse than a narrower one beyond their seeds' spread",
        "passed": not worse,
        "detail": "; ".join(worse) or f"{compared} comparisons",
    }


def share(context: Context) -> Share:
    """The share of one worker in the evaluation, which computed the cells. Only for a sweep whose manifest does not
    hold it, that of one now, which starts or joins the cluster."""
    known = read_json(context.space.cells / MANIFEST).get("share")
    return Share(**known) if known else context.share


def facts(context: Context) -> dict[str, str]:
    settings, space, each = context.settings, context.space, share(context)
    chosen = read_json(space.cells / MANIFEST)["chosen"]
    stages = {name: read_json(getattr(space, folder) / MANIFEST) for name, folder in STAGE_FOLDERS.items()}
    seconds = {name: manifest["seconds"] for name, manifest in stages.items() if manifest and "seconds" in manifest}
    data = read_json(space.data / "report.json")
    leaks, notes = data["leakage"], notes_of(data)
    left_out = f"; {leaks['left_out']} lines would have leaked and were left out" if leaks["left_out"] else ""
    return {
        "sweep": settings.name,
        "model": settings.model.source,
        **({"finetuned model": f"{settings.model.finetuned}, {_how(context)}"} if settings.model.finetuned else {}),
        **_what_changed(context),
        **{
            f"{target} deltas": f"sites {sites_label(context.sites_of(target))}, d_new "
            + ", ".join(map(str, settings.deltas.d_new))
            for target in settings.deltas.targets
        },
        "spliced for behaviour": "; ".join(
            f"{Ground(target, combination['percentile']).label}, d_new {combination['d_new']}"
            for target, combination in chosen.items()
        ),
        **({"trained together": together} if (together := polished(context)) else {}),
        "seed": str(settings.seed),
        "leakage between train, validation and evaluation": ("none" if leaks["ok"] else str(leaks["pairs"])) + left_out,
        **({"rows": "; ".join(notes)} if notes else {}),
        "time by stage": ", ".join(f"{name} {clock(value)}" for name, value in seconds.items()),
        "machine": f"{platform.machine()}, {each.at_once} workers of {each.cpus} CPU"
        + (f" and {each.gpus:g} GPU" if each.gpus else ""),
        "versions": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
        "git commit": str((read_json(space.folder / "versions.json") or {}).get("git commit", "unknown")),
    }


def _what_changed(context: Context) -> dict[str, str]:
    """What finetuning changed, what was left out because it did not change, and what is unusual about the pair."""
    known = context.pair
    if known is None:
        return {}
    unchanged = context.unchanged
    left_out = {"left out": f"sites that did not change: {sites_label(unchanged)}"} if unchanged else {}
    notes = {"notes on the pair": "; ".join(known["notes"])} if known["notes"] else {}
    return {"finetuning changed": known["in_words"], **left_out, **notes}


def pair(context: Context) -> str:
    """Which two models were compared, as a sentence."""
    model = context.settings.model
    if model.finetuned:
        return f"{model.source} and {model.finetuned}, which was made elsewhere and {_how(context)}."
    values = (read_json(context.space.lora / MANIFEST) or {}).get("params", {})
    where = "all linear layers" if values.get("targets") == "all-linear" else values.get("targets", "its layers")
    return f"{model.source} before and after LoRA finetuning on {where} (rank {values.get('r', '?')})."


def _how(context: Context) -> str:
    return (read_json(context.space.lora / MANIFEST) or {}).get("how", "adopted")


def polished(context: Context) -> str:
    """The effect of joint polish on the change deltas, as a sentence; empty if there was none."""
    found = (read_json(context.space.deltas / MANIFEST) or {}).get("polished", {})
    parts = [
        f"{name}, step {run['step']} of {context.settings.deltas.polish_steps}: KL {run['val_kl_before']:.4f} to "
        f"{run['val_kl']:.4f} nats a target token, {run['val_l0_before']:.2f} to {run['val_l0']:.2f} features a token"
        for name, run in found.items()
    ]
    return f"The change deltas of all layers were then trained together ({'; '.join(parts)})." if parts else ""


STAGE_FOLDERS = {
    "data": "data",
    "lora": "lora",
    "transcoders": "transcoders",
    "deltas": "deltas",
    "evaluate": "cells",
}


def generations(context: Context) -> list[dict[str, Any]]:
    """The texts of all cells, each with the target and the seed of the `deltas` that were spliced in."""
    names = read_json(context.space.cells / MANIFEST)["cells"]
    rows: list[dict[str, Any]] = []
    for name, cell in zip(names, context.cells, strict=True):
        path = context.space.generations / f"{name}.jsonl"
        if path.is_file():
            of_cell = {"deltas": cell["target"], "seed": cell["seed"]}
            rows += [{**json.loads(line), **of_cell} for line in path.read_text().splitlines()]
    return rows


def _results(folder: Path) -> list[dict[str, Any]]:
    return [read_json(path) for path in sorted(folder.glob("trial_*/result.json"))]

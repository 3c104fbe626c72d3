"""Loads what a finished sweep kept: the finetuned model, and the sites of its deltas.

In: a `Context` whose sweep is finished up to its deltas. Out: a TransformerBridge, sites, and where they are stored.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.errors import RequestError
from jobs.files import read_json
from jobs.study.context import Context
from jobs.study.stages.deltas import group_name
from jobs.study.stages.transcoders import chosen_base, root, taps_of
from models.gemma_scope import selection_label

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from evaluators.splice.interventions import Site


def finetuned(context: Context) -> Path:
    """The merged model; raises RequestError if the sweep has none yet."""
    folder = context.space.lora / "merged"
    if not (folder / "config.json").is_file():
        raise RequestError(f"the sweep {context.settings.name} has no finetuned model under {folder}; run `lora` first")
    return folder


def load_bridge(context: Context) -> TransformerBridge:
    """The finetuned model in fp32 on this machine's first device."""
    import torch

    from jobs.study.stages.worker_memory import bridge

    device = "cuda" if torch.cuda.is_available() and context.settings.compute.gpus_per_trial != 0 else "cpu"
    return bridge(str(finetuned(context)), device, "fp32")


def combination(context: Context, percentile: float | None, d_new: int | None) -> tuple[float | None, int]:
    """The (percentile, d_new) given, or the one whose behaviour was evaluated."""
    evaluated = read_json(context.space.cells / "manifest.json") or {}
    percentile = percentile if percentile is not None else evaluated.get("percentile")
    d_new = d_new if d_new is not None else evaluated.get("d_new")
    if d_new is None or (percentile is None and None not in context.settings.deltas.selections):
        raise RequestError("--percentile and --d-new: the sweep has not been evaluated yet, so give both")
    return percentile, d_new


def load_sites(context: Context, layers: list[int], percentile: float | None, d_new: int) -> list[Site]:
    """The sites of `layers`; raises RequestError for a layer that was not swept or a group without a kept delta."""
    from evaluators.splice.interventions import Site
    from models.deltas import read_delta
    from models.gemma_scope import read

    sites = []
    for layer in layers:
        if layer not in context.layers:
            raise RequestError(f"--layer: got {layer}, but the sweep has {', '.join(map(str, context.layers))}")
        group = context.space.deltas / group_name(layer, percentile, d_new)
        best = read_json(group / "best.json")
        if best is None:
            raise RequestError(
                f"no kept delta under {group}; the sweep has percentiles "
                f"{context.settings.deltas.percentiles} and d_new {context.settings.deltas.d_new}"
            )
        base = read(root(context), chosen_base(context, layer, percentile), layer, taps_of(context))
        sites.append(Site(layer, base, read_delta(group / f"trial_{best['trial']:04d}")))
    return sites


def export(context: Context, kind: str, folder: Path, percentile: float | None, d_new: int, alpha: float) -> list[Path]:
    """Exports base and delta fused, in another tool's format; raises RequestError for an unknown format."""
    from models import exports
    from models.fuse import fuse
    from models.sources import model_facts

    sites = load_sites(context, context.layers, percentile, d_new)
    fused = {site.layer: fuse(site.base, site.delta, alpha) for site in sites if site.delta is not None}
    facts = model_facts(context.model)
    model = exports.ExportedModel(
        name=str(finetuned(context)),
        n_layers=facts["n_layers"],
        d_model=facts["d_model"],
        context_size=context.settings.activations.max_length,
        taps=taps_of(context),
    )
    notes = {"sweep": context.settings.name, "percentile": percentile, "d_new": d_new, "alpha": alpha}
    if kind == "gemma-scope":
        return exports.write_gemma_scope(fused, model, folder, _average_l0(context, percentile, d_new), notes)
    if kind == "saelens":
        return exports.write_saelens(fused, model, folder, notes)
    if kind == "circuit-tracer":
        return exports.write_circuit_tracer(fused, model, folder, notes)
    raise RequestError(f"--format: got {kind!r}, allowed are gemma-scope, saelens and circuit-tracer")


def _average_l0(context: Context, percentile: float | None, d_new: int) -> dict[int, float]:
    """Active features per token of base and delta together, measured on the evaluation text or in training."""
    found: dict[int, float] = {}
    for layer in context.layers:
        name = f"reconstruction_layer_{layer:02d}_{selection_label(percentile)}_d{d_new:03d}.json"
        cell: dict[str, Any] = read_json(context.space.cells / name) or {}
        best = read_json(context.space.deltas / group_name(layer, percentile, d_new) / "best.json")
        base = cell.get("l0_base", chosen_base(context, layer, percentile).average_l0)
        found[layer] = base + cell.get("l0_delta", best["figures"]["val_l0_delta"])
    return found

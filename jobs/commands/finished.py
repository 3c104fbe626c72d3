"""Loads what a finished sweep kept: the finetuned model, and the sites of its deltas.

In: a `Context` whose sweep is finished up to its deltas. Out: a TransformerBridge, sites, and where they are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.readers import UNLABELLED
from data.rows import Row, make_row
from jobs.capture.bases import chosen_base, root, taps_of
from jobs.context.context import Context
from jobs.context.kept import best_of_group, delta_folder
from jobs.errors import RequestError
from jobs.evaluation.kinds import Reconstruction
from jobs.files import MANIFEST, read_json
from jobs.seals import SEAL, require
from sites import Address, Ground, sites_label

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from evaluators.splice.interventions import Site
    from models.gemma_scope import Candidate
    from models.transcoder import Transcoder

FORMATS = ("gemma-scope", "saelens", "circuit-tracer")


def finetuned(context: Context) -> Path:
    """The finetuned model; raises RequestError if the sweep has none yet, or its files are damaged."""
    folder = context.finetuned
    if not (folder / MANIFEST if folder != context.adopted else folder / "config.json").is_file():
        raise RequestError(f"the sweep {context.settings.name} has no finetuned model under {folder}; run `lora` first")
    require(*([] if folder == context.adopted else [folder]))
    require(*([context.model] if (context.model / SEAL).is_file() else []))  # built under the storage root
    return folder


def load_bridge(context: Context) -> TransformerBridge:
    """The finetuned model in fp32 on this machine's first device."""
    from jobs.capture.worker_memory import bridge

    return bridge(str(finetuned(context)), device_for(context), "fp32")


def device_for(context: Context) -> str:
    """This machine's first device that the settings allow."""
    import torch

    return "cuda" if torch.cuda.is_available() and context.settings.compute.gpus_per_trial != 0 else "cpu"


def asked(context: Context, prompt: str, target: str = "") -> Row:
    """A prompt in the format of the sweep's rows; raises DataError where its chat template refuses it."""
    from jobs.study.stages.data import chat_of

    chat = chat_of(context)
    if chat is None:
        section = context.settings.data
        tokens = section.special_tokens == "tokens"
        return make_row(prompt, target, UNLABELLED, separator=section.separator, special_tokens=tokens)
    return chat.render_text(prompt, target).row(prompt, UNLABELLED)


@dataclass(frozen=True)
class Asked:
    """Which deltas a command was asked for; what is None is as the sweep evaluated it."""

    target: str | None = None
    percentile: float | None = None
    d_new: int | None = None


def combination(context: Context, asked: Asked) -> tuple[Ground, int]:
    """The ground and d_new asked for, or those whose behaviour was evaluated."""
    targets = context.settings.deltas.targets
    target = asked.target or targets[0]
    if target not in targets:
        raise RequestError(f"--deltas: got {target}, but the sweep has {' and '.join(targets)}")
    evaluated = (read_json(context.space.cells / MANIFEST) or {}).get("chosen", {}).get(target, {})
    percentile = asked.percentile if asked.percentile is not None else evaluated.get("percentile")
    d_new = asked.d_new if asked.d_new is not None else evaluated.get("d_new")
    needs_base = target == "residual" and percentile is None and None not in context.settings.deltas.selections
    if d_new is None or needs_base:
        both = "--d-new" if target == "change" else "--percentile and --d-new"
        raise RequestError(f"{both}: the sweep has not been evaluated yet, so this must be given")
    return Ground(target, percentile if target == "residual" else None), d_new


def load_sites(
    context: Context, layers: list[int] | None, chosen: tuple[Ground, int], bridge: TransformerBridge | None = None
) -> list[Site]:
    """The sites of `layers` (None: all of the target); a change delta's ground is read beside the `bridge`'s model.

    Raises RequestError for a layer without deltas, or a group without a kept one.
    """
    from evaluators.splice.interventions import Site
    from models.blocks import read_paths

    ground, _ = chosen
    known = context.layers_of(ground.target)
    for layer in layers or []:
        if layer not in known:
            raise RequestError(
                f"--layer: got {layer}, but the {ground.target} deltas have {sites_label(map(context.site, known))}"
            )
    deltas = load_deltas(context, layers or known, chosen)
    if ground.target == "change":
        paths = read_paths(bridge or load_bridge(context), context.model, list(deltas))
        return [Site(layer, paths[layer], delta) for layer, delta in deltas.items()]
    bases = {layer: chosen_base(context, context.site(layer), ground.percentile) for layer in deltas}
    return [Site(layer, _base(context, bases[layer], layer), delta) for layer, delta in deltas.items()]


def _base(context: Context, base: Candidate, layer: int) -> Transcoder:
    """A base transcoder; raises RequestError where it was trained here and is damaged."""
    from models.gemma_scope import read

    folder = Path(root(context)) / base.path
    if context.settings.transcoders.source == "train":
        require(folder / "config.json", folder / "params.npz")
    return read(root(context), base, layer, taps_of(context))


def load_deltas(context: Context, layers: list[int], chosen: tuple[Ground, int]) -> dict[int, Transcoder]:
    """The kept deltas of `layers`."""
    from models.deltas import read_delta

    found = {}
    for layer in layers:
        group = Address(context.site(layer), *chosen)
        folder = delta_folder(context, group)
        if folder is None:
            section = context.settings.deltas
            raise RequestError(
                f"no kept delta under {context.space.deltas / group.folder}; the sweep has targets {section.targets}, "
                f"percentiles {section.percentiles} and d_new {section.d_new}"
            )
        require(folder / "config.json", folder / "delta.safetensors")
        found[layer] = read_delta(folder)
    return found


def export(
    context: Context, kind: str, folder: Path, asked: Asked, alpha: float, onto_bases: bool = False
) -> list[Path]:
    """Exports deltas in another tool's format, with a model card: a residual delta fused with its base, a change delta
    by itself or, with `onto_bases`, fused with its layer's base where there is one.

    A change delta joins a base transcoder of any kind as `base(x) + error(x) + alpha * delta(x)`, with the error node
    `error(x) = y_un(x) - base(x)`, which the notes say. Raises RequestError for an unknown format, or without bases.
    """
    from jobs.commands.model_card import Exported, hub_name, model_card
    from models import exports
    from models.fuse import fuse, scaled
    from models.sources import model_facts
    from models.transcoder import without_bos

    if kind not in FORMATS:
        raise RequestError(f"--format: got {kind!r}, allowed are {', '.join(FORMATS)}")
    chosen = ground, d_new = combination(context, asked)
    layers = context.layers_of(ground.target)
    bases: dict[int, Candidate] = {}
    if ground.target == "change":
        deltas = load_deltas(context, layers, chosen)
        fused = {layer: scaled(without_bos(delta), alpha) for layer, delta in deltas.items()}
        if onto_bases:
            bases = _bases(context, asked, list(fused))
            fused = {layer: fuse(_base(context, base, layer), fused[layer]) for layer, base in bases.items()}
    else:
        sites = load_sites(context, layers, chosen)
        fused = {site.layer: fuse(site.base, site.delta, alpha) for site in sites if site.base and site.delta}
    facts = model_facts(context.model)
    model = exports.ExportedModel(
        name=hub_name(context) or str(finetuned(context)),
        n_layers=facts["n_layers"],
        d_model=facts["d_model"],
        context_size=context.settings.activations.max_length,
        taps=taps_of(context),
    )
    notes = {"sweep": context.settings.name, **ground._asdict(), "d_new": d_new, "alpha": alpha}
    if ground.target == "change":
        error = "error(x) = y_un(x) - base(x), the base's error on the un-finetuned MLP"
        notes["use"] = f"add to the un-finetuned MLP's output, or to base(x) + error(x), {error}"
        if onto_bases:
            notes["bases"] = {str(layer): base.path for layer, base in bases.items()}
            notes["use"] = f"holds base(x) + alpha * delta(x); the finetuned MLP also needs the error node {error}"
        notes["bos"] = "what the deltas add at BOS, where no transcoder is read, is left out"
    card = model_card(context, Exported(kind, ground, d_new, sorted(fused), alpha, onto_bases))
    if kind == "gemma-scope":
        average_l0 = _average_l0(context, ground, d_new)
        for layer, base in bases.items():
            average_l0[layer] += base.average_l0
        return exports.write_gemma_scope(fused, model, folder, average_l0, notes, card)
    if kind == "saelens":
        return exports.write_saelens(fused, model, folder, notes, card)
    return exports.write_circuit_tracer(fused, model, folder, notes, card)


def _bases(context: Context, asked: Asked, layers: list[int]) -> dict[int, Candidate]:
    """The base transcoders of those of `layers` that have one; raises RequestError where none has."""
    known = [layer for layer in layers if layer in context.layers_of("residual")]
    if not known:
        raise RequestError(
            f"--onto-bases: the sweep {context.settings.name} has no base transcoders; they come with residual among "
            "deltas.targets"
        )
    ground, _ = combination(context, Asked("residual", asked.percentile, asked.d_new))
    return {layer: chosen_base(context, context.site(layer), ground.percentile) for layer in known}


def _average_l0(context: Context, ground: Ground, d_new: int) -> dict[int, float]:
    """Active features per token of what is exported, measured on the evaluation text or in training."""
    found: dict[int, float] = {}
    for layer in context.layers_of(ground.target):
        group = Address(context.site(layer), ground, d_new)
        best = best_of_group(context, group)
        assert best is not None, "its delta has been loaded"
        found[layer] = best["figures"]["val_l0_delta"]
        if ground.target == "residual":
            name = Reconstruction.name_of(group)
            cell: dict[str, Any] = read_json(context.space.cells / f"{name}.json") or {}
            base = cell.get("l0_base", chosen_base(context, group.site, ground.percentile).average_l0)
            found[layer] = base + cell.get("l0_delta", found[layer])
    return found

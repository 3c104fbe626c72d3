"""Loads what a finished sweep kept: the finetuned model and the deltas.

In: a `Context` whose sweep is finished up to its deltas. Out: a TransformerBridge, patches, bases and deltas.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from data.readers import UNLABELLED
from data.rows import Row, make_row
from jobs.capture.bases import chosen_base, root
from jobs.commands.feature_choice import EVERY_FEATURE, FeatureChoice, chosen_features
from jobs.commands.made_with import check_deltas, check_model
from jobs.context.context import Context
from jobs.errors import RequestError
from jobs.files import MANIFEST, SEAL, read_json, require
from sites import Address, Ground, Site, mlp_sites, sites_label

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from evaluators.splice.interventions import Patch
    from models.gemma_scope import Candidate
    from models.rest import Rest
    from models.transcoder import Transcoder


def finetuned(context: Context) -> Path:
    """The finetuned model's folder. Raises RequestError if the sweep has none yet, or its files are damaged."""
    folder = context.finetuned
    if not (folder / MANIFEST if folder != context.adopted else folder / "config.json").is_file():
        raise RequestError(f"the sweep {context.settings.name} has no finetuned model under {folder}; run `lora` first")
    if folder != context.adopted:
        _check_pair(context)  # an adapter, merged: perhaps the one that the settings named before
        check_model(context)
        require(folder)
    require(*([context.model] if (context.model / SEAL).is_file() else []))  # built under the storage root
    return folder


def _check_pair(context: Context) -> None:
    """Raises RequestError if what the sweep has made may be of another finetuned model than the settings name."""
    if context.adopted is not None and context.pair is None:
        raise RequestError(
            f"model.finetuned: the sweep {context.settings.name} has not yet read {context.settings.model.finetuned} "
            "as it is now; run `lora` first"
        )


def load_bridge(context: Context) -> TransformerBridge:
    """The finetuned model in fp32 on this machine's first device."""
    from jobs.capture.worker_memory import bridge

    return bridge(str(finetuned(context)), device_for(context), "fp32")


def load_rest(context: Context, chosen: tuple[Ground, int], patches: Sequence[Patch]) -> Rest | None:
    """The un-finetuned values of what finetuning changed outside all sites, which a sweep sets to the same strength as
    its deltas; None if there is nothing, or if the patches leave out a changed site."""
    from models.rest import read_rest

    complete = chosen[0].target == "change" and context.is_everything([patch.site for patch in patches])
    return read_rest(context.model, context.rest) if complete and context.rest else None


def device_for(context: Context) -> str:
    """This machine's first device that the settings allow."""
    import torch

    return "cuda" if torch.cuda.is_available() and context.settings.compute.gpus_per_trial != 0 else "cpu"


def prompt_row(context: Context, prompt: str, target: str = "") -> Row:
    """A prompt in the format of the sweep's rows. Raises DataError if the chat template rejects it."""
    from jobs.sweep.stages.data import chat_of

    chat = chat_of(context)
    if chat is None:
        section = context.settings.data
        tokens = section.special_tokens == "tokens"
        return make_row(prompt, target, UNLABELLED, separator=section.separator, special_tokens=tokens)
    return chat.render_text(prompt, target).row(prompt, UNLABELLED)


def check_length(bridge: TransformerBridge, row: Row, new_tokens: int) -> None:
    """Raises RequestError if a prompt and its answer, or its target, do not fit the model's context."""
    from data.encoding import encode_prompt, encode_row

    prompt = len(encode_prompt(bridge.tokenizer, row))
    longest: int | None = getattr(bridge.original_model.config, "max_position_embeddings", None)
    answer = max(new_tokens, len(encode_row(bridge.tokenizer, row).target) if row.target else 0)
    if longest is not None and prompt + answer > longest:
        raise RequestError(
            f"--prompt: it has {prompt} tokens, and its answer up to {answer}, but the model's context holds {longest}"
        )


@dataclass(frozen=True)
class DeltaChoice:
    """The deltas requested from a command; None stands for what the sweep evaluated."""

    target: str | None = None
    percentile: float | None = None
    d_new: int | None = None


def combination(context: Context, choice: DeltaChoice) -> tuple[Ground, int]:
    """The requested ground and d_new, or those whose behaviour was evaluated."""
    targets = context.settings.deltas.targets
    target = choice.target or targets[0]
    if target not in targets:
        raise RequestError(f"--deltas: got {target}, but the sweep has {' and '.join(targets)}")
    evaluated = (read_json(context.space.cells / MANIFEST) or {}).get("chosen", {}).get(target, {})
    percentile = choice.percentile if choice.percentile is not None else evaluated.get("percentile")
    d_new = choice.d_new if choice.d_new is not None else evaluated.get("d_new")
    needs_base = target == "residual" and percentile is None and None not in context.settings.deltas.selections
    if d_new is None or needs_base:
        options = "--d-new" if target == "change" else "--percentile and --d-new"
        raise RequestError(f"{options}: must be given, because the sweep has not been evaluated yet")
    return Ground(target, percentile if target == "residual" else None), d_new


def load_patches(
    context: Context,
    layers: list[int] | None,
    chosen: tuple[Ground, int],
    bridge: TransformerBridge | None = None,
    features: FeatureChoice = EVERY_FEATURE,
) -> list[Patch]:
    """The patches of all sites in `layers` (None for all of the target), with the chosen features. For change deltas,
    the un-finetuned paths are read for the model in `bridge`.

    Raises RequestError for a layer without deltas, or a group without a kept one.
    """
    from evaluators.splice.interventions import Patch
    from models.blocks import read_paths

    ground, _ = chosen
    with_deltas = context.layers_of(ground.target)
    for layer in layers or []:
        if layer not in with_deltas:
            raise RequestError(
                f"--layer: got {layer}, but the {ground.target} deltas have {sites_label(mlp_sites(with_deltas))}"
            )
    sites = [site for site in context.sites_of(ground.target) if site.layer in (layers or with_deltas)]
    deltas = load_deltas(context, sites, chosen, features)
    if ground.target == "change":
        paths = read_paths(bridge or load_bridge(context), context.model, list(deltas))
        return [Patch(site, paths[site], delta) for site, delta in deltas.items()]
    bases = {site: chosen_base(context, site, ground.percentile) for site in deltas}
    return [Patch(site, load_base(context, bases[site], site), delta) for site, delta in deltas.items()]


def load_base(context: Context, base: Candidate, site: Site) -> Transcoder:
    """A base transcoder. Raises RequestError if it was trained here and is damaged."""
    from models.gemma_scope import read

    folder = Path(root(context)) / base.path
    if context.settings.transcoders.source == "train":
        require(folder / "config.json", folder / "params.npz")
    return read(root(context), base, site)


def load_deltas(
    context: Context, sites: Sequence[Site], chosen: tuple[Ground, int], features: FeatureChoice = EVERY_FEATURE
) -> dict[Site, Transcoder]:
    """The kept deltas of `sites`, with the chosen features."""
    from models.deltas import read_delta

    _check_pair(context)
    check_deltas(context, [Address(site, *chosen) for site in sites])
    deltas = {}
    for site in sites:
        group = Address(site, *chosen)
        folder = context.kept_delta(group)
        if folder is None:
            section = context.settings.deltas
            raise RequestError(
                f"no kept delta under {context.space.deltas / group.folder}; the sweep has targets {section.targets}, "
                f"percentiles {section.percentiles} and d_new {section.d_new}"
            )
        require(folder / "config.json", folder / "delta.safetensors")
        deltas[group.site] = read_delta(folder)
    return chosen_features(context, deltas, chosen, features)

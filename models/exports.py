"""Transcoders in the formats of Gemma Scope, SAELens and circuit-tracer.

In: transcoders by site (a base, or a base fused with its delta), and a description of the model. Out: a folder for
those libraries' own loaders; what they load computes the same outputs, which `tests/compatibility/` checks.

Each writer looks up each transcoder at most twice, so a mapping that loads on access holds only one in memory. `notes`
are JSON-able facts (alpha, sweep, which base and delta), stored under the key `deltascope`; `card` is the text of
README.md (empty: no README).
Each returns the weight files it wrote, and writes either all of them or none. Each raises ModelError if there is
nothing to export, a transcoder does not fit its site or the model, the folder is not empty, or the format cannot
express it.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from data.files import replacing
from models import gemma_scope
from models.errors import ModelError
from models.transcoder import Transcoder, check_fits
from sites import MLP, Kind, Site

SAELENS_SCHEMA = "6.0.0"
"""The first SAELens version whose cfg.json has hook names under `metadata`; with no version, SAELens drops them."""

_HOOK = re.compile(r"\w+(\.\w+)*")


@dataclass(frozen=True)
class ExportedModel:
    """The model that the exported transcoders belong to.

    `name` is the hub repository or local folder to load it from (the merged model, if deltas were trained on a
    finetuned one); `context_size` is the longest training text in tokens.
    """

    name: str
    n_layers: int
    d_model: int
    context_size: int
    kind: Kind = MLP
    """Kind of the model's MLP sites, with the hooks they read and write."""


def write_gemma_scope(
    transcoders: Mapping[Site, Transcoder],
    model: ExportedModel,
    folder: Path,
    average_l0: Mapping[Site, float],
    notes: Mapping[str, Any],
    card: str = "",
) -> list[Path]:
    """Writes `layer_L/width_W/average_l0_N/params.npz`, each with a config.json that holds the taps and `notes`.

    `average_l0` is the mean number of active features per token, by site (base and delta together if they are fused).
    The folder's name contains it, rounded.
    """
    _check(transcoders, model)
    _check_mlps("Gemma Scope", transcoders)
    for site in transcoders:
        if not math.isfinite(average_l0.get(site, math.nan)):
            raise ModelError(f"Gemma Scope export: layer {site.label} has no average_l0, needed for the folder's name")
    paths = []
    with _new_folder(folder, card) as staged:
        for site in sorted(transcoders):
            transcoder = transcoders[site]
            width = gemma_scope.width_label(transcoder.d_sae)
            place = f"{site.published_folder}/{width}/average_l0_{average_l0[site]:.0f}"
            facts = {"model_name": model.name, "average_l0": float(average_l0[site]), "deltascope": dict(notes)}
            gemma_scope.write(_portable(transcoder), staged / place, facts)
            paths.append(folder / place / "params.npz")
    return paths


def write_saelens(
    transcoders: Mapping[Site, Transcoder], model: ExportedModel, folder: Path, notes: Mapping[str, Any], card: str = ""
) -> list[Path]:
    """Writes `layer_L/cfg.json` and `layer_L/sae_weights.safetensors`, for `SAE.load_from_disk(folder / "layer_L")`."""
    _check(transcoders, model)
    for kind in {site.kind for site in transcoders}:
        _check_hooks("SAELens", kind)
    with _new_folder(folder, card) as staged:
        for site in sorted(transcoders):
            transcoder = _portable(transcoders[site])
            place = staged / site.published_folder
            place.mkdir()
            save_file({key: getattr(transcoder, key) for key in gemma_scope.KEYS}, place / "sae_weights.safetensors")
            config = json.dumps(_saelens_config(transcoder, model, notes), indent=1)
            (place / "cfg.json").write_text(config, encoding="utf-8")
    return [folder / site.published_folder / "sae_weights.safetensors" for site in sorted(transcoders)]


def write_circuit_tracer(
    transcoders: Mapping[Site, Transcoder], model: ExportedModel, folder: Path, notes: Mapping[str, Any], card: str = ""
) -> list[Path]:
    """Writes config.yaml and `layer_{i}.safetensors` for every layer of the model, all padded to the widest.

    The padding is features that are never active. A layer without a transcoder has only those, so circuit-tracer counts
    its whole MLP output as error. Load the folder from a hub repository with these files, or locally with
    `load_transcoders_from_cache(folder.name, cache_dir=folder.parent)`. circuit-tracer's nnsight backend supports
    `ln2.hook_normalized` only for Gemma; its TransformerLens backend supports it for every model.
    """
    width = _check(transcoders, model)
    _check_hooks("circuit-tracer", model.kind)
    _check_mlps("circuit-tracer", transcoders)
    config = {
        "model_name": model.name,
        "model_kind": "transcoder_set",
        "feature_input_hook": model.kind.reads,
        "feature_output_hook": model.kind.writes[0],
        "deltascope": dict(notes),
    }
    with _new_folder(folder, card) as staged:
        for layer in range(model.n_layers):
            site = Site(layer, model.kind)
            exported = transcoders[site] if site in transcoders else _featureless(model, site)
            transcoder = _padded(_portable(exported), width)
            tensors = {key: getattr(transcoder, key) for key in gemma_scope.KEYS}
            tensors["W_enc"] = transcoder.W_enc.T.contiguous()
            tensors["activation_function.threshold"] = tensors.pop("threshold")
            save_file(tensors, staged / f"layer_{layer}.safetensors")
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        (staged / "config.yaml").write_text(text, encoding="utf-8")
    return [folder / f"layer_{layer}.safetensors" for layer in range(model.n_layers)]


def _check(transcoders: Mapping[Site, Transcoder], model: ExportedModel) -> int:
    """Returns the largest width. Raises ModelError if there are no transcoders, or one does not fit its site."""
    if not transcoders:
        raise ModelError("export: no transcoders were given; give one for at least one layer")
    width = 0
    for site, transcoder in transcoders.items():
        origin = f"export, layer {site.label}"
        if not 0 <= site.layer < model.n_layers:
            raise ModelError(f"{origin}: the model has layers 0 to {model.n_layers - 1}")
        mlp = site.kind.name == MLP.name  # only an MLP's widths follow from the model's
        d_in, d_out = (model.d_model, model.d_model) if mlp else (transcoder.d_in, transcoder.d_out)
        kind = model.kind if mlp else site.kind
        check_fits(transcoder, Site(site.layer, kind), d_in=d_in, d_out=d_out, origin=origin)
        if transcoder.site != site:
            raise ModelError(f"{origin}: {site.words} was given a transcoder of {transcoder.site.words}")
        width = max(width, transcoder.d_sae)
    return width


def _padded(transcoder: Transcoder, width: int) -> Transcoder:
    """The transcoder padded to `width` features. The added ones are never active, so its outputs are unchanged."""
    missing = width - transcoder.d_sae
    pad = torch.nn.functional.pad
    return replace(
        transcoder,
        W_enc=pad(transcoder.W_enc, (0, missing)),
        b_enc=pad(transcoder.b_enc, (0, missing)),
        W_dec=pad(transcoder.W_dec, (0, 0, 0, missing)),
        # An added feature's pre-activation is 0. The threshold is not infinity, which some readers refuse.
        threshold=pad(transcoder.threshold, (0, missing), value=1.0),
    )


def _portable(transcoder: Transcoder) -> Transcoder:
    """The transcoder in fp32 on the CPU, with a decoder bias and no threshold below 0.

    circuit-tracer applies the threshold without a ReLU, so a threshold below 0 would let negative activations through.
    Raising it to 0 gives the same function in both libraries.
    """

    def portable(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", torch.float32).contiguous()

    b_dec = transcoder.b_dec if transcoder.b_dec is not None else torch.zeros(transcoder.d_out)
    return replace(
        transcoder,
        W_enc=portable(transcoder.W_enc),
        b_enc=portable(transcoder.b_enc),
        threshold=portable(transcoder.threshold).clamp_min(0.0),
        W_dec=portable(transcoder.W_dec),
        b_dec=portable(b_dec),
    )


def _featureless(model: ExportedModel, site: Site) -> Transcoder:
    """A placeholder for a layer without a transcoder: no features and no bias, so its output is 0."""
    vector, matrix = torch.zeros(0), torch.zeros(model.d_model, 0)
    return Transcoder(matrix, vector, vector, matrix.T, None, site)


def _saelens_config(transcoder: Transcoder, model: ExportedModel, notes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architecture": "jumprelu_transcoder",
        "d_in": transcoder.d_in,
        "d_out": transcoder.d_out,
        "d_sae": transcoder.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_SCHEMA,
            "model_name": model.name,
            "hook_name": transcoder.site.reads,
            "hook_name_out": f"blocks.{transcoder.site.layer}.{transcoder.site.kind.writes[0]}",
            "prepend_bos": True,
            "context_size": model.context_size,
            "deltascope": dict(notes),
        },
    }


def _check_hooks(format_name: str, kind: Kind) -> None:
    """Raises ModelError if the format, which names one hook to read and one to write, cannot name those of `kind`."""
    for tap in kind.taps:
        if not _HOOK.fullmatch(tap):
            raise ModelError(
                f"{format_name} export: {tap} is a convention of the reference study, not a hook of a model; "
                f"this format can only name hooks such as {MLP.reads}"
            )
    if len(kind.writes) > 1:
        raise ModelError(f"{format_name} export: {kind.words} writes {len(kind.writes)} hooks; this format names one")


def _check_mlps(format_name: str, transcoders: Mapping[Site, Transcoder]) -> None:
    """Raises ModelError unless all are MLPs' transcoders with d_in equal to d_out: the format stores no other kind."""
    for site, transcoder in transcoders.items():
        if site.kind.name != MLP.name or transcoder.d_in != transcoder.d_out:
            raise ModelError(
                f"{format_name} export: {site.words} reads {transcoder.d_in} and writes {transcoder.d_out} dimensions; "
                "this format holds only transcoders of MLPs, which read and write the residual stream's width"
            )


@contextmanager
def _new_folder(folder: Path, card: str) -> Iterator[Path]:
    """Yields a temporary folder that holds the card, and renames it to `folder` if the `with` block succeeds. Never
    replaces an existing folder, unless it is empty."""
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ModelError(f"{folder} already exists; an export needs a new or an empty folder")
    try:
        with replacing(folder) as staged:
            staged.mkdir(parents=True)
            if card:
                (staged / "README.md").write_text(card, encoding="utf-8")
            yield staged
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder}: the export could not be written ({error})") from error

"""Transcoders in the formats of Gemma Scope, SAELens and circuit-tracer.

In: one transcoder per layer (a base, or base and delta fused), and the facts of the model. Out: a folder that those
libraries' own loaders can read, with the same outputs there; `tests/compatibility/` shows that.

Each writer takes transcoders by layer and looks each one up at most twice, so a mapping that loads them lazily keeps
only one in memory. `notes` are JSON-able facts (alpha, sweep, which base and delta) stored under the key `deltascope`,
`card` is the text of README.md (empty: none).
Each returns the weight files it wrote; it writes either all of them or none. Each raises ModelError if there is nothing
to export, a transcoder does not fit its layer or the model, the folder is not empty, or the format cannot express it.
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
from models.transcoder import GEMMA_SCOPE_TAPS, Taps, Transcoder, check_fits

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
    taps: Taps = GEMMA_SCOPE_TAPS


def write_gemma_scope(
    transcoders: Mapping[int, Transcoder],
    model: ExportedModel,
    folder: Path,
    average_l0: Mapping[int, float],
    notes: Mapping[str, Any],
    card: str = "",
) -> list[Path]:
    """Writes `layer_L/width_W/average_l0_N/params.npz`, each with a config.json that holds the taps and `notes`.

    `average_l0` is the mean number of active features per token, by layer (of base and delta together if they are
    fused). Rounded, it is part of the folder's name.
    """
    _check(transcoders, model)
    for layer in transcoders:
        if not math.isfinite(average_l0.get(layer, math.nan)):
            raise ModelError(f"Gemma Scope export: layer {layer} has no average_l0, which the folder's name needs")
    written = []
    with _complete(folder, card) as staged:
        for layer in sorted(transcoders):
            transcoder = transcoders[layer]
            place = f"layer_{layer}/{gemma_scope.width_label(transcoder.d_sae)}/average_l0_{average_l0[layer]:.0f}"
            facts = {"model_name": model.name, "average_l0": float(average_l0[layer]), "deltascope": dict(notes)}
            gemma_scope.write(_portable(transcoder), staged / place, facts)
            written.append(folder / place / "params.npz")
    return written


def write_saelens(
    transcoders: Mapping[int, Transcoder], model: ExportedModel, folder: Path, notes: Mapping[str, Any], card: str = ""
) -> list[Path]:
    """Writes `layer_L/cfg.json` and `layer_L/sae_weights.safetensors`, for `SAE.load_from_disk(folder / "layer_L")`."""
    _check(transcoders, model)
    _check_hooks("SAELens", model.taps)
    with _complete(folder, card) as staged:
        for layer in sorted(transcoders):
            transcoder = _portable(transcoders[layer])
            place = staged / f"layer_{layer}"
            place.mkdir()
            save_file({key: getattr(transcoder, key) for key in gemma_scope.KEYS}, place / "sae_weights.safetensors")
            config = json.dumps(_saelens_config(transcoder, model, notes), indent=1)
            (place / "cfg.json").write_text(config, encoding="utf-8")
    return [folder / f"layer_{layer}" / "sae_weights.safetensors" for layer in sorted(transcoders)]


def write_circuit_tracer(
    transcoders: Mapping[int, Transcoder], model: ExportedModel, folder: Path, notes: Mapping[str, Any], card: str = ""
) -> list[Path]:
    """Writes config.yaml and `layer_{i}.safetensors` for every layer of the model, all as wide as the widest.

    Narrower layers are padded with features that are never active, and a layer without a transcoder consists only of
    those: circuit-tracer then counts that layer's whole MLP output as error. It reads the folder as a hub repository
    with these files, or locally with `load_transcoders_from_cache(folder.name, cache_dir=folder.parent)`. Its nnsight
    backend supports `ln2.hook_normalized` only for Gemma; its TransformerLens backend supports it for every model.
    """
    width = _check(transcoders, model)
    _check_hooks("circuit-tracer", model.taps)
    config = {
        "model_name": model.name,
        "model_kind": "transcoder_set",
        "feature_input_hook": model.taps.input,
        "feature_output_hook": model.taps.output,
        "deltascope": dict(notes),
    }
    with _complete(folder, card) as staged:
        for layer in range(model.n_layers):
            known = transcoders[layer] if layer in transcoders else _featureless(model, layer)
            transcoder = _padded(_portable(known), width)
            tensors = {key: getattr(transcoder, key) for key in gemma_scope.KEYS}
            tensors["W_enc"] = transcoder.W_enc.T.contiguous()
            tensors["activation_function.threshold"] = tensors.pop("threshold")
            save_file(tensors, staged / f"layer_{layer}.safetensors")
        text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
        (staged / "config.yaml").write_text(text, encoding="utf-8")
    return [folder / f"layer_{layer}.safetensors" for layer in range(model.n_layers)]


def _check(transcoders: Mapping[int, Transcoder], model: ExportedModel) -> int:
    """The largest width; raises ModelError if there are no transcoders, or one does not fit its layer or the model."""
    if not transcoders:
        raise ModelError("export: no transcoders were given; give one for at least one layer")
    width = 0
    for layer, transcoder in transcoders.items():
        if transcoder.layer != layer:
            raise ModelError(f"export: the transcoder given for layer {layer} was made for layer {transcoder.layer}")
        check_fits(
            transcoder, d_model=model.d_model, n_layers=model.n_layers, taps=model.taps, origin=f"export, layer {layer}"
        )
        width = max(width, transcoder.d_sae)
    return width


def _padded(transcoder: Transcoder, width: int) -> Transcoder:
    """The same function with `width` features: the added ones read and write nothing and stay below their threshold."""
    missing = width - transcoder.d_sae
    pad = torch.nn.functional.pad
    return replace(
        transcoder,
        W_enc=pad(transcoder.W_enc, (0, missing)),
        b_enc=pad(transcoder.b_enc, (0, missing)),
        W_dec=pad(transcoder.W_dec, (0, 0, 0, missing)),
        # Their pre-activation is 0. A finite threshold works in any dtype, and with readers that refuse infinities.
        threshold=pad(transcoder.threshold, (0, missing), value=1.0),
    )


def _portable(transcoder: Transcoder) -> Transcoder:
    """The transcoder in fp32 on the CPU, with a decoder bias and no threshold below 0.

    circuit-tracer has no ReLU before the jump, so a threshold below 0 would let negative activations through. With 0
    the function is the same there as here.
    """

    def plain(tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", torch.float32).contiguous()

    b_dec = transcoder.b_dec if transcoder.b_dec is not None else torch.zeros(transcoder.d_model)
    return replace(
        transcoder,
        W_enc=plain(transcoder.W_enc),
        b_enc=plain(transcoder.b_enc),
        threshold=plain(transcoder.threshold).clamp_min(0.0),
        W_dec=plain(transcoder.W_dec),
        b_dec=plain(b_dec),
    )


def _featureless(model: ExportedModel, layer: int) -> Transcoder:
    """A placeholder for a layer without a transcoder: no features and no bias, so its output is 0."""
    none, wide = torch.zeros(0), torch.zeros(model.d_model, 0)
    return Transcoder(wide, none, none, wide.T, None, layer=layer, taps=model.taps)


def _saelens_config(transcoder: Transcoder, model: ExportedModel, notes: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architecture": "jumprelu_transcoder",
        "d_in": transcoder.d_model,
        "d_out": transcoder.d_model,
        "d_sae": transcoder.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": SAELENS_SCHEMA,
            "model_name": model.name,
            "hook_name": f"blocks.{transcoder.layer}.{model.taps.input}",
            "hook_name_out": f"blocks.{transcoder.layer}.{model.taps.output}",
            "prepend_bos": True,
            "context_size": model.context_size,
            "deltascope": dict(notes),
        },
    }


def _check_hooks(format_name: str, taps: Taps) -> None:
    for tap in taps:
        if not _HOOK.fullmatch(tap):
            raise ModelError(
                f"{format_name} export: {tap} is a convention of the reference study, not a hook of a model; "
                f"this format can only name hooks such as {GEMMA_SCOPE_TAPS.input}"
            )


@contextmanager
def _complete(folder: Path, card: str) -> Iterator[Path]:
    """Yields a folder to fill, with the card in it, which becomes `folder` if the `with` block succeeds; never replaces
    an existing one."""
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

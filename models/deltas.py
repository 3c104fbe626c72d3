"""Delta transcoders as files: `delta.safetensors` and `config.json` in one folder.

In: a `Transcoder` without decoder bias and facts about its training. Out: the same transcoder, read back and checked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.files import replacing
from models.errors import ModelError
from models.transcoder import Transcoder, read_config, write_config

WEIGHTS = ("W_enc", "b_enc", "threshold", "W_dec")


def write_delta(delta: Transcoder, folder: Path, facts: dict[str, Any]) -> None:
    """Writes fp32 weights, and layer, taps and `facts` as config.json, each under a temporary name and then renamed.

    The weights come last, so a folder with weights is complete. Raises ModelError for a transcoder with a decoder bias,
    which a strength would scale as if it were a feature.
    """
    if delta.b_dec is not None:
        raise ModelError(f"{folder}: a delta transcoder must not have a decoder bias, but this one does")
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder / "config.json", delta, facts)
    tensors = {key: getattr(delta, key).detach().to("cpu", torch.float32).contiguous() for key in WEIGHTS}
    with replacing(folder / "delta.safetensors") as temporary:
        save_file(tensors, temporary)


def read_delta(folder: Path) -> Transcoder:
    """The delta transcoder in `folder`, fp32, on the CPU.

    Raises ModelError if a file is missing or truncated, lacks a tensor, or holds one of the wrong shape or dtype.
    """
    path = folder / "delta.safetensors"
    for file in (path, folder / "config.json"):
        if not file.is_file():
            raise ModelError(f"{folder} has no delta transcoder ({file.name} is missing)")
    site = read_config(folder / "config.json")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path}: not a readable safetensors file ({error})") from None
    missing = [key for key in WEIGHTS if key not in tensors]
    if missing:
        raise ModelError(f"{path}: lacks {', '.join(missing)}; found {', '.join(sorted(tensors))}")
    stray = [f"{key} has dtype {tensors[key].dtype}" for key in WEIGHTS if not tensors[key].is_floating_point()]
    if stray:
        raise ModelError(f"{path}: {stray[0]}, expected floating point")
    try:
        return Transcoder(**{key: tensors[key].float() for key in WEIGHTS}, b_dec=None, site=site)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None

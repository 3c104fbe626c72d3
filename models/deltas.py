"""Delta transcoders as files: `delta.safetensors` and `config.json` in one folder.

In: a `Transcoder` without decoder bias and the facts of its training. Out: the same, read back.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from models.errors import ModelError
from models.transcoder import Taps, Transcoder

WEIGHTS = ("W_enc", "b_enc", "threshold", "W_dec")


def write_delta(delta: Transcoder, folder: Path, facts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / "delta.safetensors.tmp"
    tensors = {key: getattr(delta, key).detach().to("cpu", torch.float32).contiguous() for key in WEIGHTS}
    save_file(tensors, beside)
    config = {"layer": delta.layer, "taps": list(delta.taps), **facts}
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True))
    beside.rename(folder / "delta.safetensors")


def read_delta(folder: Path) -> Transcoder:
    """Raises ModelError where a file is missing, cut short or lacks a tensor."""
    try:
        config = json.loads((folder / "config.json").read_text())
        tensors = load_file(folder / "delta.safetensors")
        return Transcoder(
            **{key: tensors[key] for key in WEIGHTS},
            b_dec=None,
            layer=config["layer"],
            taps=Taps(*config["taps"]),
        )
    except FileNotFoundError as error:
        raise ModelError(f"{folder}: no delta transcoder here ({error.filename} is missing)") from None
    except (SafetensorError, json.JSONDecodeError, KeyError) as error:
        raise ModelError(f"{folder}: not a readable delta transcoder ({error})") from None

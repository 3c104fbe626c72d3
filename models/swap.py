"""Puts one model's MLPs into another of the same architecture, for the length of a `with` block.

In: a TransformerBridge, layers, and the folder of the model to take weights from. Out: the bridge with those MLPs
swapped, and restored at the end; only the tensors of those layers are read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from torch import Tensor

from models.errors import ModelError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@contextmanager
def swapped_mlps(bridge: TransformerBridge, layers: Sequence[int], folder: Path) -> Iterator[None]:
    """Puts the weights of `folder`'s MLPs into `layers`. Raises ModelError if one is missing or its shape differs."""
    model: Any = bridge.original_model
    blocks: Any = bridge.blocks
    ours = {id(parameter) for layer in layers for parameter in blocks[layer].mlp.parameters()}
    parameters = {_plain(name): one for name, one in model.named_parameters() if id(one) in ours}
    weights = read_tensors(folder, list(parameters))
    for name, parameter in parameters.items():
        if weights[name].shape != parameter.shape:
            raise ModelError(
                f"{folder}: {name} has shape {tuple(weights[name].shape)}, expected {tuple(parameter.shape)}"
            )
    held = {name: parameter.data for name, parameter in parameters.items()}
    try:
        for name, parameter in parameters.items():
            parameter.data = weights[name].to(parameter)
        yield
    finally:
        for name, parameter in parameters.items():
            parameter.data = held[name]


def read_tensors(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors with these names from a model's safetensors files. Raises ModelError if one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    else:
        files = dict.fromkeys(names, "model.safetensors")
    found: dict[str, Tensor] = {}
    for file in sorted({files[name] for name in names if name in files}):
        if not (folder / file).is_file():
            raise ModelError(f"{folder}: {file}, which holds the model's weights, is missing")
        with safe_open(folder / file, framework="pt") as opened:
            here = set(opened.keys())
            found |= {name: opened.get_tensor(name) for name in names if name in here}
    missing = [name for name in names if name not in found]
    if missing:
        raise ModelError(f"{folder}: the model's files lack {missing[0]}")
    return found


def _plain(name: str) -> str:
    """A parameter's name before the model was wrapped."""
    return name.replace("_original_component.", "")

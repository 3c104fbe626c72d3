"""Safetensors files that can tell whether they are damaged: the header holds a hash of the tensors.

In: named tensors and named texts. Out: a file written under a temporary name and renamed, and whether a file still
holds what was written. Used for files that are written often and read by workers: activations and checkpoints.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from data.files import replacing

HASH = "sha256"


def save(path: Path, tensors: Mapping[str, Tensor], texts: Mapping[str, str] | None = None) -> None:
    """Saves tensors and texts in one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    texts = dict(texts or {})
    with replacing(path) as temporary:
        save_file(on_cpu, temporary, metadata={**texts, HASH: _hash(on_cpu.items(), texts)})


def is_intact(path: Path) -> bool:
    """Whether the file holds what `save` wrote; reads all of it, one tensor at a time."""
    try:
        with safe_open(path, framework="pt") as file:
            texts = dict(file.metadata() or {})
            names = list(file.keys())  # a safe_open handle is not a mapping
            return texts.pop(HASH, None) == _hash(((name, file.get_tensor(name)) for name in names), texts)
    except (OSError, SafetensorError, ValueError, KeyError):
        return False


def _hash(tensors: Iterable[tuple[str, Tensor]], texts: Mapping[str, str]) -> str:
    """SHA-256 of the tensors' names, dtypes, shapes and bytes and of the texts, independent of their order."""
    parts = [
        f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(_bytes(tensor)).hexdigest()}"
        for name, tensor in tensors
    ]
    parts += [f"{name}={text}" for name, text in texts.items()]
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data

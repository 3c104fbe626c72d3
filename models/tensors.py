"""Single tensors out of a model's safetensors files.

In: a model's folder and the names of tensors. Out: those tensors, or shapes alone; nothing else is read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from models.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor

Shapes = dict[str, tuple[int, ...]]
"""The tensors of a file by name."""


def read_tensors(folder: Path, names: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of these names from a model's safetensors files, which may leave out the first part of a name: a body
    saved on its own, such as GPT-2's on the hub. Raises ModelError where one is missing."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    else:
        files = dict.fromkeys((*names, *map(_of_body, names)), "model.safetensors")
    places = {name: name if name in files else _of_body(name) for name in names}
    found: dict[str, Tensor] = {}
    for file in sorted({files[place] for place in places.values() if place in files}):
        if not (folder / file).is_file():
            raise ModelError(f"{folder}: {file} is missing, which holds the model's weights")
        with safe_open(folder / file, framework="pt") as opened:
            here = set(opened.keys())
            for name in names:
                if (place := name if name in here else _of_body(name)) in here:
                    found[name] = opened.get_tensor(place)
    missing = [name for name in names if name not in found]
    if missing:
        raise ModelError(f"{folder}: the model's files lack {missing[0]}")
    return found


def _of_body(name: str) -> str:
    return name.partition(".")[2]


def shapes_of(file: Path) -> Shapes:
    """The shape of every tensor of a safetensors file. Raises ModelError for a file that cannot be read."""
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read as safetensors ({' '.join(str(error).split())[:160]})") from None

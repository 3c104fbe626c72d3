"""Activation shards on disk: what a transcoder reads (`x`) and what the MLP wrote (`y`), token by token.

In: (tokens, d_model) tensors. Out: bf16 safetensors shards with an `index.json`, memory-mapped back. A shard is written
beside its name and renamed; the index is written last.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

INDEX = "index.json"


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Saves `tensors` as one safetensors file, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside)
    beside.rename(path)


def write_index(folder: Path, shards: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Marks a folder of shards as complete."""
    index = {"shards": shards, "tokens": sum(shard["tokens"] for shard in shards), **facts}
    beside = folder / f"{INDEX}.tmp"
    beside.write_text(json.dumps(index, indent=1, sort_keys=True))
    beside.rename(folder / INDEX)


@dataclass(frozen=True)
class Pairs:
    """Tensors of equal length whose rows belong together, such as (x, y) or (x, residual); maybe memory-mapped."""

    shards: list[tuple[Tensor, ...]]

    @property
    def tokens(self) -> int:
        return sum(len(shard[0]) for shard in self.shards)

    def whole(self) -> tuple[Tensor, ...]:
        """Everything as one tensor a column; copies unless there is one shard."""
        if len(self.shards) == 1:
            return self.shards[0]
        return tuple(torch.cat(columns) for columns in zip(*self.shards, strict=True))

    def batches(self, size: int, generator: torch.Generator, window: int = 4) -> Iterator[tuple[Tensor, ...]]:
        """One epoch of shuffled batches of `size` rows, the ragged last one left out unless it is the only one.

        Shards are shuffled and `window` of them are mixed at a time, which bounds memory.
        """
        order = torch.randperm(len(self.shards), generator=generator).tolist()
        for start in range(0, len(order), window):
            mixed = Pairs([self.shards[i] for i in order[start : start + window]]).whole()
            rows = torch.randperm(len(mixed[0]), generator=generator)
            for first in range(0, max(len(rows) - size + 1, 1), size):
                chosen = rows[first : first + size]
                yield tuple(column[chosen] for column in mixed)

    def in_order(self, size: int) -> Iterator[tuple[Tensor, ...]]:
        """Every row once, in order, in batches of at most `size`."""
        for shard in self.shards:
            for first in range(0, len(shard[0]), size):
                yield tuple(column[first : first + size] for column in shard)


def read_pairs(folder: Path, names: tuple[str, ...] = ("x", "y")) -> Pairs:
    """The shards of a finished folder, memory-mapped: pages are read when touched and shared between processes."""
    index = json.loads((folder / INDEX).read_text())
    shards = []
    for shard in index["shards"]:
        with safe_open(folder / shard["file"], framework="pt") as file:
            shards.append(tuple(file.get_tensor(name) for name in names))
    return Pairs(shards)


def read_index(folder: Path) -> dict[str, Any]:
    return json.loads((folder / INDEX).read_text())

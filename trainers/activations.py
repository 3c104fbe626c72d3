"""Activation shards on disk: what a transcoder reads (`x`) and what the site wrote (`y`), token by token.

In: tensors with one row per token. Out: bf16 safetensors shards with an `index.json`, read back memory-mapped. A shard
is written under a temporary name and renamed; the index is written last.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.files import replacing
from trainers import checked_files, prefetch

INDEX = "index.json"


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Saves `tensors`, each (tokens, ...), as one safetensors file, under a temporary name and then renamed."""
    checked_files.save(path, tensors)


def shard_tokens(path: Path) -> int:
    """How many tokens a shard holds, read from its header alone."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())  # a safe_open handle is not a mapping
        return file.get_slice("x" if "x" in names else names[0]).get_shape()[0]


def write_index(folder: Path, shards: list[dict[str, Any]], facts: dict[str, Any]) -> None:
    """Writes the index, which marks a folder of shards as complete; `shards` are {file, tokens} in order."""
    index = {"shards": shards, "tokens": sum(shard["tokens"] for shard in shards), **facts}
    with replacing(folder / INDEX) as temporary:
        temporary.write_text(json.dumps(index, indent=1, sort_keys=True))


@dataclass(frozen=True, eq=False)  # hashed by identity: what is computed from pairs can be kept for as long as they are
class Pairs:
    """Tensors of equal length whose rows belong together, such as (x, y) or (x, residual); possibly memory-mapped."""

    shards: list[tuple[Tensor, ...]]

    @property
    def tokens(self) -> int:
        return sum(len(shard[0]) for shard in self.shards)

    def whole(self) -> tuple[Tensor, ...]:
        """Everything, as one tensor per column; copies unless there is only one shard."""
        if len(self.shards) == 1:
            return self.shards[0]
        return tuple(torch.cat(columns) for columns in zip(*self.shards, strict=True))

    @cached_property
    def joined(self) -> tuple[Tensor, ...]:
        """`whole`, kept for later epochs and runs."""
        return self.whole()

    def near(self, device: str) -> Pairs:
        """A copy in GPU memory if it fits in half of what is free there; else in pinned host memory if there is room.
        Unchanged for a CPU device, and if the tensors are on a GPU already."""
        if not device.startswith("cuda") or all(tensor.is_cuda for shard in self.shards for tensor in shard):
            return self
        if self.nbytes > torch.cuda.mem_get_info(device)[0] // 2:
            return Pairs(prefetch.pinned(self.shards))
        return Pairs([tuple(tensor.to(device) for tensor in shard) for shard in self.shards])

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for shard in self.shards for tensor in shard)

    def batch_count(self, size: int) -> int:
        """Number of batches that `batches(size)` yields."""
        return max(1, self.tokens // size)

    def batches(
        self, size: int, generator: torch.Generator, window: int = 4, *, skip: int = 0, device: str = "cpu"
    ) -> Iterator[tuple[Tensor, ...]]:
        """One epoch of shuffled batches of `size` rows on `device`: `batch_count` of them, no row twice.

        Shards are shuffled and `window` of them are mixed at a time, which bounds memory. Rows that do not fill a batch
        carry over to the next window; those of the last window are dropped, unless there are fewer than `size` in all.
        The first `skip` batches are not built; the rest, and the state of `generator`, are as if they had been.

        A batch is only valid until the next one is requested, which reuses its memory. (On a CPU, touching that much
        fresh memory takes longer than gathering the rows.)
        """
        buffers = tuple(column.new_empty(size, *column.shape[1:], device=device) for column in self.shards[0])
        order = torch.randperm(len(self.shards), generator=generator).tolist()
        leftover: list[tuple[Tensor, ...]] = []
        number = 0
        groups = [[self.shards[i] for i in order[start : start + window]] for start in range(0, len(order), window)]
        # A CPU would spend more time on joining a few shards in every epoch's order than on gathering their rows.
        use_joined = len(groups) == 1 and device == "cpu" and not self.shards[0][0].is_cuda
        for fresh in prefetch.moved(groups, device) if not use_joined else [[]]:
            mixed = self.joined if use_joined else Pairs([*leftover, *fresh]).whole()
            del fresh
            rows = torch.randperm(len(mixed[0]), generator=generator).to(device)
            if use_joined:
                rows = self._places(order)[rows]
            full = len(rows) - len(rows) % size
            for first in range(0, full, size):
                number += 1
                if number > skip:
                    chosen = rows[first : first + size]
                    for column, batch in zip(mixed, buffers, strict=True):
                        torch.index_select(column, 0, chosen, out=batch)
                    yield buffers
            leftover = [tuple(column.index_select(0, rows[full:]) for column in mixed)]
        if self.tokens < size and not skip:
            yield leftover[0]

    def _places(self, order: list[int]) -> Tensor:
        """Where in `joined` each row of the shards in `order` is."""
        places = torch.arange(self.tokens).split([len(shard[0]) for shard in self.shards])
        return torch.cat([places[i] for i in order])

    def in_order(self, size: int) -> Iterator[tuple[Tensor, ...]]:
        """Every row once, in order, in batches of at most `size`."""
        for shard in self.shards:
            for first in range(0, len(shard[0]), size):
                yield tuple(column[first : first + size] for column in shard)


def read_pairs(folder: Path, names: tuple[str, ...] = ("x", "y")) -> Pairs:
    """The shards of a finished folder, memory-mapped: pages are read on first access and shared between processes."""
    shards = []
    for shard in read_index(folder)["shards"]:
        with safe_open(folder / shard["file"], framework="pt") as file:
            shards.append(tuple(file.get_tensor(name) for name in names))
    return Pairs(shards)


def captured_columns(folder: Path) -> set[str]:
    """The columns that a finished folder holds; empty if it is unfinished or damaged."""
    try:
        return names_in(folder / read_index(folder)["shards"][0]["file"])
    except (OSError, SafetensorError, ValueError, LookupError, TypeError):
        return set()


def names_in(path: Path) -> set[str]:
    """The names of a shard's tensors."""
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def damaged_files(folder: Path) -> list[Path]:
    """Files of a folder of shards, finished or not, that do not hold what was written; reads all of them."""
    damaged = [path for path in sorted(folder.glob("*.safetensors")) if not checked_files.is_intact(path)]
    return damaged + misfits(folder / INDEX, damaged)


def misfits(index: Path, damaged: Collection[Path] = ()) -> list[Path]:
    """Shards that an index lists and that are missing, and the index itself if it cannot be read or lists other numbers
    of tokens than the shards hold that are not `damaged`."""
    missing: list[Path] = []
    if not index.is_file():
        return missing
    try:
        listed = {index.parent / shard["file"]: shard["tokens"] for shard in read_index(index.parent)["shards"]}
        missing = [path for path in listed if not path.is_file()]
        present = [path for path in listed if path not in missing and path not in damaged]
        fits = all(shard_tokens(path) == listed[path] for path in present)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError):
        fits = False
    return missing if fits else [*missing, index]


def read_index(folder: Path) -> dict[str, Any]:
    """What `write_index` wrote: `shards`, `tokens` and the facts."""
    return json.loads((folder / INDEX).read_text())

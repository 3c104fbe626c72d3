"""Activation capture: one pass of a model over texts, every swept site at once, streamed to disk.

In: a TransformerBridge, token sequences, and the columns to keep for each site. Out:
`FOLDER/layer_LL/shard_*.safetensors` with `x`, `y` or `change` of every token but BOS and padding. One shard is in
memory at a time; an interrupted capture continues from its last shard.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from data.encoding import by_length, pad_left
from models.blocks import BlockPath, hooks_at
from models.bridge import device_of, hooked
from sites import Site
from trainers import checked_files
from trainers.activations import shard_tokens, write_index, write_shard

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Sequences = Sequence[Sequence[int]]


BOS_FILE = "bos.safetensors"


class _LastTap(Exception):
    """Ends a forward pass early, after the last swept site."""


class Columns(NamedTuple):
    """What to keep of a site in addition to its input x: the output y; with the un-finetuned block's path
    `unfinetuned`, the change c = y - y_un(x) in fp32; with `sums`, the sums of y that its variance needs. If the model
    itself runs in less than fp32, pass `finetuned`, whose output then replaces y in the change."""

    y: bool = True
    unfinetuned: BlockPath | None = None
    finetuned: BlockPath | None = None
    sums: bool = False


@dataclass(frozen=True)
class Plan:
    """Which tokens a capture reads, and in which order: shards of batches of sequence indices.

    Each batch has sequences of similar length; batches are shuffled, so that every shard is a sample of all lengths.
    """

    sequences: Sequences
    shards: list[list[list[int]]]

    @classmethod
    def make(cls, sequences: Sequences, batch_tokens: int = 4096, shard_tokens: int = 65536, seed: int = 0) -> Plan:
        """A plan for `sequences` of token ids that start with BOS; the same arguments give the same plan.

        A batch has at most `batch_tokens` padded tokens (or one sequence), a shard at least `shard_tokens`, except that
        the last may have fewer. Raises ValueError if no sequence has a token after BOS.
        """
        if not any(len(row) > 1 for row in sequences):
            raise ValueError(f"nothing to capture: none of {len(sequences)} sequences has a token after BOS")
        batches = list(by_length([len(row) for row in sequences], batch_tokens))
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
        shards: list[list[list[int]]] = [[]]
        tokens = 0
        for index in order:
            if tokens >= shard_tokens:
                shards.append([])
                tokens = 0
            shards[-1].append(batches[index])
            tokens += sum(len(sequences[i]) - 1 for i in batches[index])
        return cls(sequences, shards)

    def tokens(self, shard: int) -> int:
        """Number of tokens in a shard, without BOS."""
        return sum(len(self.sequences[i]) - 1 for batch in self.shards[shard] for i in batch)


def capture(
    bridge: TransformerBridge,
    plan: Plan,
    sites: Mapping[Site, Columns],
    folder: Path,
    *,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Captures every missing shard, then writes the indices; calls `report(shards done, total shards)`."""
    for number in range(len(plan.shards)):
        capture_shard(bridge, plan, number, sites, folder)
        report(number + 1, len(plan.shards))
    finish_capture(plan, sites, folder)


def capture_shard(
    bridge: TransformerBridge,
    plan: Plan,
    number: int,
    sites: Mapping[Site, Columns],
    folder: Path,
) -> None:
    """Writes one shard of the bf16 activations of `sites`, unless all of it exists already."""
    if all((folder / site.folder / _shard_name(number)).is_file() for site in sites):
        return
    captured: dict[Site, list[dict[str, Tensor]]] = {site: [] for site in sites}
    for batch in plan.shards[number]:
        rows = [plan.sequences[i] for i in batch]
        for site, columns in capture_batch(bridge, rows, sites).items():
            captured[site].append(columns)
    for site, parts in captured.items():
        tensors = {name: torch.cat([part[name] for part in parts]) for name in parts[0] if not name.startswith("sum")}
        sums = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0] if name.startswith("sum")}
        write_shard(folder / site.folder / _shard_name(number), tensors | sums)


def finish_capture(plan: Plan, sites: Mapping[Site, object], folder: Path) -> None:
    """Marks the sites' folders as complete.

    Raises ValueError if a shard does not belong to this plan, for example because another capture used the folder.
    """
    for site in sites:
        for number in range(len(plan.shards)):
            path = folder / site.folder / _shard_name(number)
            if (tokens := shard_tokens(path)) != plan.tokens(number):
                raise ValueError(f"{path} has {tokens} tokens, but the plan has {plan.tokens(number)}; delete {folder}")
    shards = [{"file": _shard_name(n), "tokens": plan.tokens(n)} for n in range(len(plan.shards))]
    for site in sites:
        write_index(folder / site.folder, shards, {"layer": site.layer, "taps": site.kind.taps})


def _shard_name(number: int) -> str:
    return f"shard_{number:04d}.safetensors"


@torch.inference_mode()
def bos_changes(
    bridge: TransformerBridge,
    first: int,
    unfinetuned: Mapping[Site, BlockPath],
    finetuned: Mapping[Site, BlockPath],
) -> dict[Site, Tensor]:
    """For each site the change at BOS (the token `first`), (d_out,) fp32 on the CPU. BOS attends only to itself, so the
    change is the same in every text."""
    changes: dict[Site, Tensor] = {}

    def reader(site: Site) -> Callable[[Tensor], None]:
        def read(x: Tensor) -> None:
            changes[site] = (finetuned[site](x[0, 0]).float() - unfinetuned[site](x[0, 0]).float()).cpu()

        return read

    model: Any = bridge.original_model
    bos = torch.tensor([[first]], device=device_of(bridge))
    with hooked(bridge, [hook for site in unfinetuned for hook in hooks_at(bridge, site, reader(site))]):
        model.base_model(input_ids=bos, use_cache=False)
    return changes


def write_bos(folder: Path, changes: Mapping[Site, Tensor]) -> None:
    """Writes a capture's changes at BOS, under a temporary name and then renamed."""
    checked_files.save(folder / BOS_FILE, {site.label: change for site, change in changes.items()})


def read_bos(folder: Path) -> dict[Site, Tensor]:
    """The captured change at BOS of each site, (d_out,) fp32; empty if the file is damaged."""
    if not checked_files.is_intact(folder / BOS_FILE):
        return {}
    return {Site.parse(label): change for label, change in load_file(folder / BOS_FILE).items()}


@torch.inference_mode()
def capture_batch(
    bridge: TransformerBridge, rows: Sequences, sites: Mapping[Site, Columns]
) -> dict[Site, dict[str, Tensor]]:
    """For each site its columns, (tokens, d_in or d_out) bf16 on the CPU, row by row, without BOS and padding.

    With `change` or `sums`, also y's `sum` and `sum_of_squares`, (d_out,) fp64, which give its variance.
    """
    model: Any = bridge.original_model
    batch = pad_left(rows, bridge.tokenizer.pad_token_id).to(device_of(bridge))
    tokens = batch.editable
    last = max(sites)
    inputs: dict[Site, Tensor] = {}
    captured: dict[Site, dict[str, Tensor]] = {}

    def reader(site: Site) -> Callable[[Tensor], None]:
        def read(x: Tensor) -> None:
            inputs[site] = x[tokens]

        return read

    def writer(site: Site) -> Callable[[Tensor], None]:
        def write(y: Tensor) -> None:
            captured[site] = _columns(sites[site], inputs.pop(site), y[tokens])
            if site == last:
                raise _LastTap

        return write

    hooks = [hook for site in sites for hook in hooks_at(bridge, site, reader(site), see=writer(site))]
    try:
        with hooked(bridge, hooks):
            model.base_model(**batch.inputs, use_cache=False)
    except _LastTap:
        pass
    return captured


def _columns(columns: Columns, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """The columns to store, from x (tokens, d_in) and y (tokens, d_out)."""
    captured = {"x": x} | ({"y": y} if columns.y else {})
    sums = {}
    if columns.unfinetuned is not None:
        finetuned = y if columns.finetuned is None else columns.finetuned(x)
        captured["change"] = finetuned.float() - columns.unfinetuned(x).float()
    if columns.sums or columns.unfinetuned is not None:
        exact = y.to(torch.float64, copy=True)
        sums = {"sum": exact.sum(0).cpu(), "sum_of_squares": exact.square_().sum(0).cpu()}
    return {name: tensor.to("cpu", torch.bfloat16) for name, tensor in captured.items()} | sums

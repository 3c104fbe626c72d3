"""Activation capture: one pass of a model over texts, every swept layer at once, streamed to disk.

In: a TransformerBridge and token sequences. Out: `FOLDER/layer_LL/shard_*.safetensors` with `x` and `y` of every token
except BOS and padding. Memory holds one shard; an interrupted capture continues after its last shard.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from data.encoding import by_length, pad_left
from models.bridge import device_of, read_input, tap_names
from models.transcoder import GEMMA_SCOPE_TAPS, Taps
from trainers.activations import shard_tokens, write_index, write_shard

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Sequences = Sequence[Sequence[int]]


class _LastTap(Exception):
    """Ends a forward pass early: nothing above the last swept layer is needed."""


def layer_folder(folder: Path, layer: int) -> Path:
    """Where a capture in `folder` stores a layer."""
    return folder / f"layer_{layer:02d}"


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
        held = 0
        for index in order:
            if held >= shard_tokens:
                shards.append([])
                held = 0
            shards[-1].append(batches[index])
            held += sum(len(sequences[i]) - 1 for i in batches[index])
        return cls(sequences, shards)

    def tokens(self, shard: int) -> int:
        """Number of tokens captured in a shard: all but BOS."""
        return sum(len(self.sequences[i]) - 1 for batch in self.shards[shard] for i in batch)


def capture(
    bridge: TransformerBridge,
    plan: Plan,
    layers: Sequence[int],
    folder: Path,
    *,
    taps: Taps = GEMMA_SCOPE_TAPS,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Captures every missing shard, then writes the indices; calls `report(shards done, shards in all)`."""
    for number in range(len(plan.shards)):
        capture_shard(bridge, plan, number, layers, folder, taps)
        report(number + 1, len(plan.shards))
    finish_capture(plan, layers, folder, taps)


def capture_shard(
    bridge: TransformerBridge,
    plan: Plan,
    number: int,
    layers: Sequence[int],
    folder: Path,
    taps: Taps = GEMMA_SCOPE_TAPS,
) -> None:
    """Writes one shard of the bf16 activations of `layers`, unless all of it exists already."""
    if all((layer_folder(folder, layer) / _shard_name(number)).is_file() for layer in layers):
        return
    held: dict[int, list[tuple[Tensor, Tensor]]] = {layer: [] for layer in layers}
    for batch in plan.shards[number]:
        rows = [plan.sequences[i] for i in batch]
        for layer, pair in capture_batch(bridge, rows, layers, taps).items():
            held[layer].append(pair)
    for layer, pairs in held.items():
        x, y = (torch.cat(column) for column in zip(*pairs, strict=True))
        write_shard(layer_folder(folder, layer) / _shard_name(number), {"x": x, "y": y})


def finish_capture(plan: Plan, layers: Sequence[int], folder: Path, taps: Taps = GEMMA_SCOPE_TAPS) -> None:
    """Marks the layers' folders as complete.

    Raises ValueError if a shard does not belong to this plan, as when the folder was used by a different capture.
    """
    for layer in layers:
        for number in range(len(plan.shards)):
            path = layer_folder(folder, layer) / _shard_name(number)
            if (held := shard_tokens(path)) != plan.tokens(number):
                raise ValueError(f"{path} has {held} tokens, but the plan has {plan.tokens(number)}; delete {folder}")
    shards = [{"file": _shard_name(n), "tokens": plan.tokens(n)} for n in range(len(plan.shards))]
    for layer in layers:
        write_index(layer_folder(folder, layer), shards, {"layer": layer, "taps": list(taps)})


def _shard_name(number: int) -> str:
    return f"shard_{number:04d}.safetensors"


@torch.inference_mode()
def capture_batch(
    bridge: TransformerBridge, rows: Sequences, layers: Sequence[int], taps: Taps = GEMMA_SCOPE_TAPS
) -> dict[int, tuple[Tensor, Tensor]]:
    """`x` and `y` of each layer, (tokens, d_model) bf16 on the CPU, row by row, without BOS and padding."""
    model: Any = bridge.original_model
    batch = pad_left(rows, bridge.tokenizer.pad_token_id).to(device_of(bridge))
    kept = batch.editable
    seen: dict[tuple[int, int], Tensor] = {}

    def reader(layer: int, column: int):
        def read(activation: Tensor, hook: object) -> None:
            chosen = activation[kept]
            seen[layer, column] = (chosen if column else read_input(taps, chosen)).to("cpu", torch.bfloat16)
            if (layer, column) == (max(layers), 1):
                raise _LastTap

        return read

    hooks = [(name, reader(layer, i)) for layer in layers for i, name in enumerate(tap_names(taps, layer))]
    try:
        with bridge.hooks(fwd_hooks=hooks):
            model.base_model(
                input_ids=batch.ids,
                attention_mask=batch.mask.long(),
                position_ids=batch.positions,
                use_cache=False,
            )
    except _LastTap:
        pass
    return {layer: (seen[layer, 0], seen[layer, 1]) for layer in layers}

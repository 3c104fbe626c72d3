"""Where the finetuning lives: what is lost when one part of the model is un-finetuned, and what it brings alone.

In: a model's passes, the un-finetuned weights of what finetuning changed, and rows. Out: the cross-entropy of each row
for the finetuned model, the un-finetuned one, and for each part in two ways: un-finetuned while all else is finetuned,
and finetuned while all else is not. No deltas are needed. The parts stand in for each other, so the two ways may give a
part very different shares.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from data.encoding import Batch, Encoded, encode_row, pad_left
from data.rows import Row
from evaluators.splice.passes import PROJECTED, Passes, in_slices, project, run_up_to
from models.blocks import BlockPath, differs, exchanged, read_paths, sites_with
from models.bridge import device_of
from models.rest import Rest, read_rest
from sites import mlp_sites, sets_of, sites_label

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

REST = "rest"
PARTS = {
    "patterns": ("attn.q", "attn.k"),
    "values": ("attn.v",),
    "output": ("attn.o", "ln1_post"),
    "mlp": ("ln2", "mlp", "ln2_post"),
    REST: ("ln1",),
}
"""The bridge's components in each part of the model. The norm before attention serves both patterns and values, so it
belongs to the rest, like everything outside the sites."""
EVERY = "all"
"""As a part: all parts of a block. As layers: all layers, and everything outside the blocks."""
UNFINETUNED, FINETUNED = "unfinetuned", "finetuned"
"""The two ways: only this part is un-finetuned, or only this part is finetuned."""


class Piece(NamedTuple):
    """A part of one layer; the layer is None for everything outside the sites."""

    part: str
    layer: int | None


class Group(NamedTuple):
    """Pieces that are measured together: a part in all layers, or all parts of a third of the layers."""

    part: str
    layers: str


@dataclass(frozen=True)
class Changes:
    """What finetuning changed, piece by piece: the un-finetuned weights."""

    paths: Mapping[Piece, BlockPath]
    rest: Rest | None = None

    @classmethod
    def of(cls, bridge: TransformerBridge, paths: Iterable[BlockPath], rest: Rest | None = None) -> Changes:
        """Cuts un-finetuned paths into pieces and keeps those with a weight that is not the bridge's own; `rest` holds
        the parameters outside all sites that finetuning changed."""
        pieces = [(Piece(part, path.site.layer), path.only(owned)) for path in paths for part, owned in PARTS.items()]
        return cls({piece: path for piece, path in pieces if differs(bridge, path)}, rest)

    @classmethod
    def between(cls, bridge: TransformerBridge, folder: Path, names: Iterable[str]) -> Changes:
        """The pieces that hold the parameters `names`, those that changed since the un-finetuned model in `folder`."""
        sites, rest = sites_with(bridge.original_model.config, names)
        return cls.of(bridge, read_paths(bridge, folder, sites).values(), read_rest(folder, rest) if rest else None)

    @property
    def pieces(self) -> frozenset[Piece]:
        return frozenset(self.paths) | ({Piece(REST, None)} if self.rest is not None else set())

    def groups(self, n_layers: int) -> dict[Group, frozenset[Piece]]:
        """The pieces of each part that finetuning changed, then those of each third of the model's layers, without the
        rest."""
        groups = {Group(part, EVERY): frozenset(piece for piece in self.pieces if piece.part == part) for part in PARTS}
        for third in sets_of("thirds", mlp_sites(range(n_layers))):
            layers = {site.layer for site in third}
            groups[Group(EVERY, sites_label(third))] = frozenset(
                piece for piece in self.pieces if piece.layer in layers and piece.part != REST
            )
        return {group: pieces for group, pieces in groups.items() if pieces}

    def undone_by_group(self, n_layers: int) -> dict[tuple[Group, str], frozenset[Piece]]:
        """What is undone for each group in each of the two ways."""
        groups = self.groups(n_layers).items()
        ways = {UNFINETUNED: lambda pieces: pieces, FINETUNED: lambda pieces: self.pieces - pieces}
        return {(group, way): undone(pieces) for group, pieces in groups for way, undone in ways.items()}

    @contextmanager
    def undone(self, bridge: TransformerBridge, pieces: Collection[Piece]) -> Iterator[None]:
        """Inside the `with`, the bridge runs with the un-finetuned weights of `pieces`."""
        with ExitStack() as stack:
            if self.rest is not None and Piece(REST, None) in pieces:
                stack.enter_context(self.rest.at(bridge, 0.0))
            stack.enter_context(exchanged(bridge, [path for piece, path in self.paths.items() if piece in pieces]))
            yield


def parts_ceiling(passes: Passes, changes: Changes, rows: Sequence[Row]) -> dict[str, Any]:
    """`finetuned` and `unfinetuned`: one entry per row with `nll` (nats, summed over its `n_tokens` target tokens).
    `parts`: for each group of pieces and each way its `part`, `layers`, `way` and `rows`."""
    encoded = [encode_row(passes.bridge.tokenizer, row) for row in rows]
    undone = changes.undone_by_group(passes.bridge.cfg.n_layers)
    models = models_of(changes, passes.bridge.cfg.n_layers)
    nlls: dict[tuple[frozenset[Piece], int], float] = {}

    def run(chosen: Sequence[int]) -> None:
        examples = [encoded[index] for index in chosen]
        batch = pad_left([row.ids for row in examples], passes.bridge.tokenizer.pad_token_id)
        for pieces, row_nlls in _scored(passes.bridge, changes, models, examples, batch.to(device_of(passes.bridge))):
            nlls.update(((pieces, index), nll) for index, nll in zip(chosen, row_nlls, strict=True))

    in_slices(sorted(range(len(rows)), key=lambda i: (len(encoded[i].ids), encoded[i].ids, i)), passes.batch_size, run)
    scores = {
        pieces: [
            {"index": index, "nll": nlls[pieces, index], "n_tokens": len(row.target)}
            for index, row in enumerate(encoded)
        ]
        for pieces in models
    }
    return {
        "finetuned": scores[frozenset()],
        "unfinetuned": scores[changes.pieces],
        "parts": [
            {"part": group.part, "layers": group.layers, "way": way, "rows": scores[pieces]}
            for (group, way), pieces in undone.items()
        ],
    }


def models_of(changes: Changes, n_layers: int) -> list[frozenset[Piece]]:
    """The models that are measured, by what is undone in them. If there is only one part, some are the same."""
    groups = changes.undone_by_group(n_layers)
    return list(dict.fromkeys([frozenset[Piece](), changes.pieces, *groups.values()]))


def _scored(
    bridge: TransformerBridge,
    changes: Changes,
    models: Sequence[frozenset[Piece]],
    rows: Sequence[Encoded],
    batch: Batch,
    after: int = -1,
    stream: Tensor | None = None,
) -> Iterator[tuple[frozenset[Piece], list[float]]]:
    """Each model, by what is undone in it, and its nats on each row's target. The models are the same up to block
    `after`, which `stream` leaves.

    They run together as far as they are the same, then those that are the same above, so no block runs twice on the
    same stream, and only the streams from which others start are in memory.
    """
    differing = frozenset.union(*models) - frozenset.intersection(*models)
    parting = min(map(_lowest, differing), default=bridge.cfg.n_layers)
    if not differing:
        with changes.undone(bridge, models[0]), torch.inference_mode():
            nlls = _nlls(bridge, run_up_to(bridge, batch, parting - 1, (), after, stream), rows, batch)
        yield models[0], nlls
        return
    if parting - 1 > after:
        with changes.undone(bridge, models[0]), torch.inference_mode():
            stream, after = run_up_to(bridge, batch, parting - 1, (), after, stream), parting - 1
    same_start: dict[frozenset[Piece], list[frozenset[Piece]]] = defaultdict(list)
    for pieces in models:
        same_start[frozenset(piece for piece in pieces if _lowest(piece) == parting)].append(pieces)
    for members in same_start.values():
        yield from _scored(bridge, changes, members, rows, batch, after, stream)


def _lowest(piece: Piece) -> int:
    """The first layer that a piece changes; -1 for what is outside the sites, such as the embedding."""
    return -1 if piece.layer is None else piece.layer


def _nlls(bridge: TransformerBridge, last: Tensor, rows: Sequence[Encoded], batch: Batch) -> list[float]:
    """Nats of each row's target, from what leaves the last block (row, position, d_model)."""
    length, counts = batch.ids.shape[1], [len(row.target) for row in rows]
    columns = torch.cat([torch.arange(length - count, length) for count in counts]).to(batch.ids.device)
    lines = torch.repeat_interleave(torch.arange(len(rows)), torch.tensor(counts)).to(batch.ids.device)
    logits = project(bridge, last[lines, columns - 1])
    ends = batch.ids[lines, columns].split(PROJECTED)
    nlls = [functional.cross_entropy(*pair, reduction="none") for pair in zip(logits, ends, strict=True)]
    return [row_nlls.sum().item() for row_nlls in torch.cat(nlls).double().cpu().split(counts)]

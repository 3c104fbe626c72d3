"""Where the finetuning lives: what is lost when one part of the model is un-finetuned, and what it brings alone.

In: a model's passes, the un-finetuned weights of what finetuning changed, and rows. Out: the cross-entropy of each row
for the finetuned model, the un-finetuned one, and for each part in two ways: un-finetuned while all else is finetuned,
and finetuned while all else is not. No deltas are needed. The parts stand in for each other, so the two ways may give a
part very different shares.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from data.encoding import Encoded, encode_row
from data.rows import Row
from evaluators.splice.interventions import Edit
from evaluators.splice.passes import Passes
from evaluators.splice.teacher_forcing import Job, score
from models.blocks import BlockPath, differs, exchanged, read_paths, sites_with
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
    everything = changes.pieces
    groups = changes.groups(passes.bridge.cfg.n_layers)
    undone = {(group, UNFINETUNED): pieces for group, pieces in groups.items()}
    undone |= {(group, FINETUNED): everything - pieces for group, pieces in groups.items()}
    # If there is only one part, some of these are the same model.
    scores = {
        pieces: _scored(passes, changes, pieces, encoded)
        for pieces in dict.fromkeys([frozenset[Piece](), everything, *undone.values()])
    }
    return {
        "finetuned": scores[frozenset()],
        "unfinetuned": scores[everything],
        "parts": [
            {"part": group.part, "layers": group.layers, "way": way, "rows": scores[undone[group, way]]}
            for group in groups
            for way in (UNFINETUNED, FINETUNED)
        ],
    }


def _scored(
    passes: Passes, changes: Changes, pieces: Collection[Piece], encoded: Sequence[Encoded]
) -> list[dict[str, Any]]:
    with changes.undone(passes.bridge, pieces):
        scored = score(passes, Edit(), [Job(row) for row in encoded])  # raw shares no prefix with any other model
    return [{"index": index, "nll": row.nll, "n_tokens": row.n_tokens} for index, row in enumerate(scored)]

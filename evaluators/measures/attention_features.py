"""What attention's delta features read and do: which heads they use, how they move attention, what their values write.

In: a model's passes, patches, features, and the contexts in which they fire most. Out: shares by head, changes of
attention by piece of text, and the vectors that a feature's values write to the residual stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from data.encoding import pad_left
from evaluators.measures.single_features import Feature, numbered, only
from evaluators.splice.interventions import EVERY, Edit, Patch, RowEdits, spliced
from evaluators.splice.passes import Passes, in_slices, run_up_to
from models.blocks import output_of_heads
from models.bridge import device_of, hook_names
from sites import Site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

DIGITS = 4
"""Decimals of the numbers stored in a cell."""


class Look(NamedTuple):
    """Where a feature fires most strongly in a text: the token ids, the place `peak` of that token, and the tokens
    shown around it, from `first` on; `counts` is the number of tokens in each piece of text."""

    ids: Sequence[int]
    peak: int
    first: int
    counts: Sequence[int]

    @property
    def end(self) -> int:
        return self.first + sum(self.counts)


class _Change(NamedTuple):
    """What a feature adds to attention, by head: from its token to each token up to `Look.end`, and from each of these
    to its token, both (head, token)."""

    given: Tensor
    received: Tensor


@torch.inference_mode()
def pattern_changes(
    passes: Passes, patches: Sequence[Patch], looks: Mapping[Feature, Sequence[Look]]
) -> dict[Feature, list[dict[str, Any]]]:
    """For each feature of queries, keys and values, one entry per look: what the feature adds to the attention patterns
    of its own layer, all deltas at full strength minus all but it. Empty if the model exposes no patterns.

    `from` is the attention that the feature's token pays, `to` the attention that later tokens of the context pay to
    it. Each has `sizes` by query head: for `from`, half the sum of |change| over all keys, which is the share of the
    token's attention that moves; for `to`, the mean |change| over the later tokens. `head` is the head where most
    moves, and `changes` are its changes by piece of the context: summed over a piece's tokens as keys (`from`), the
    largest of them as queries (`to`). `before` is the total gain of the tokens before the context.
    """
    entries: dict[Feature, list[dict[str, Any]]] = {feature: [] for feature in looks}
    for site in sorted({site for site, _ in looks}):
        chosen = [(feature, look) for feature, entries in looks.items() if feature[0] == site for look in entries]
        changes = _changes(passes, patches, site, [(number, look) for (_, number), look in chosen])
        for (feature, look), change in zip(chosen, changes, strict=False):
            entries[feature].append({"from": _paid(look, change.given), "to": _received(look, change.received)})
    return entries


def _changes(passes: Passes, patches: Sequence[Patch], site: Site, chosen: Sequence[tuple[int, Look]]) -> list[_Change]:
    """The changes in the order of `chosen`, (feature number, look); empty if the model exposes no patterns."""
    bridge, name = passes.bridge, f"blocks.{site.layer}.attn.hook_pattern"
    if name not in hook_names(bridge):
        return []
    below = [patch for patch in numbered(patches) if patch.site <= site]  # later sites cannot matter
    (patch_of_site,) = (patch for patch in below if patch.site == site)
    order = sorted(range(len(chosen)), key=lambda i: chosen[i][1].end)
    changes: dict[int, _Change] = {}
    with spliced(bridge, Edit(below, "full")) as splice:

        def run(indices: Sequence[int]) -> None:
            # Attention is causal, so texts end with the context. Each is there twice: with the feature and without.
            rows = [list(chosen[i][1].ids[: chosen[i][1].end]) for i in indices for _ in range(2)]
            kept_ranks = [ranks for i in indices for ranks in (EVERY, only(patch_of_site, chosen[i][0], outside=True))]
            batch = pad_left(rows, bridge.tokenizer.pad_token_id).to(device_of(bridge))
            device, length = batch.ids.device, batch.ids.shape[1]

            def note(pattern: Tensor, hook: object) -> None:
                for index, i in enumerate(indices):
                    look, (full, without) = chosen[i][1], pattern[2 * index : 2 * index + 2].float()
                    start = length - look.end
                    given, received = (
                        (full.select(way, start + look.peak) - without.select(way, start + look.peak))[:, start:].cpu()
                        for way in (1, 2)  # as a query, and as a key
                    )
                    changes[i] = _Change(given, received)

            splice.reset(
                batch.editable,
                torch.ones(len(rows), device=device),
                RowEdits(kept=torch.tensor(kept_ranks, device=device), bos=batch.bos),
            )
            run_up_to(bridge, batch, site.layer, [(name, note)])

        in_slices(order, max(1, passes.batch_size // 2), run)
    return [changes[i] for i in range(len(chosen))] if changes else []  # some models have the hook and never run it


def _paid(look: Look, change: Tensor) -> dict[str, Any]:
    sizes = change.abs().sum(1) / 2
    head = int(sizes.argmax())
    by_piece = [float(piece.sum()) for piece in change[head, look.first :].split(list(look.counts))]
    before = round(float(change[head, : look.first].sum()), DIGITS)
    return {"sizes": rounded(sizes), "head": head, "changes": rounded(by_piece), "before": before}


def _received(look: Look, change: Tensor) -> dict[str, Any]:
    change[:, : look.peak + 1] = 0.0  # no earlier token attends to it, and its attention to itself is in `_paid`
    sizes = change.abs().sum(1) / max(1, look.end - look.peak - 1)
    head = int(sizes.argmax())
    pieces = change[head, look.first :].split(list(look.counts))
    by_piece = [float(piece[piece.abs().argmax()]) for piece in pieces]
    return {"sizes": rounded(sizes), "head": head, "changes": rounded(by_piece)}


def heads_written(patch: Patch, feature: int, d_head: int) -> dict[str, list[float]]:
    """For `q`, `k` and `v`, each head's share of a decoder row's squared norm. The three differ in size, so each part
    of the row is divided by the mean square of the un-finetuned weights that write there."""
    assert patch.path is not None
    parts = patch.transcoder.W_dec[feature].float().square().split(patch.path.widths)
    squares = {}
    for name, part in zip("qkv", parts, strict=True):
        weight: Any = patch.path.parts[f"attn.{name}"].weight
        squares[name] = (part / weight.float().square().mean().clamp(min=1e-12)).view(-1, d_head).sum(1)
    total = torch.stack([squares_by_head.sum() for squares_by_head in squares.values()]).sum().clamp(min=1e-12)
    return {name: (squares_by_head / total).tolist() for name, squares_by_head in squares.items()}


def heads_read(patch: Patch, feature: int, mean_squares: Tensor, n_heads: int) -> list[float]:
    """Each head's share of an encoder column's squared norm, with each weight multiplied by the root mean square of z
    in its head; `mean_squares` (d_in,) are those of z over tokens. Empty for a feature that reads nothing, as at BOS.
    """
    column = patch.transcoder.W_enc[:, feature].float().square().view(n_heads, -1).sum(1)
    read_share = column * mean_squares.to(column).view(n_heads, -1).mean(1)
    return rounded(read_share / read_share.sum()) if read_share.sum() > 0 else []


def written_by_values(bridge: TransformerBridge, patch: Patch, feature: int, most: int) -> dict[int, Tensor]:
    """By value head, the vector (d_model,) that the feature's values add to the stream if each query head that shares
    them attends only to its token. The vector goes through the finetuned model's own output projection, and through the
    norm after it, if any, by itself. Only the `most` heads with the largest shares; empty if the output projection is
    not one of TransformerLens' components.
    """
    assert patch.path is not None
    path = output_of_heads(bridge, patch.site.layer)
    if path is None:
        return {}
    n_heads, d_head = bridge.cfg.n_heads, path.d_in // bridge.cfg.n_heads
    row = patch.transcoder.W_dec[feature].float()
    values = row.split(patch.path.widths)[2].view(-1, d_head)
    shared = n_heads // len(values)
    vectors = {}
    with torch.inference_mode():
        nothing = path(row.new_zeros(1, path.d_in)).float()  # what biases add, whatever is attended to
        for head in values.norm(dim=1).argsort(descending=True).tolist()[:most]:
            if values[head].any():
                z = row.new_zeros(n_heads, d_head)
                z[head * shared : (head + 1) * shared] = values[head]
                vectors[head] = (path(z.view(1, -1)).float() - nothing)[0]
    return vectors


def rounded(values: Tensor | Sequence[float]) -> list[float]:
    return [round(float(value), DIGITS) for value in values]

"""What delta features of attention read and do: which heads, whose attention moves, and what their values would write.

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
"""After the point, of what goes into a cell."""


class Look(NamedTuple):
    """Where a feature fires most strongly in a text: its token ids, the place of that token, and the tokens shown
    around it, from `first` on: `counts` has how many there are in each piece of text."""

    ids: Sequence[int]
    peak: int
    first: int
    counts: Sequence[int]

    @property
    def end(self) -> int:
        return self.first + sum(self.counts)


class _Change(NamedTuple):
    """What a feature adds to attention, by head: of its token to each token up to `Look.end`, and of each of these to
    its token, both (head, token)."""

    given: Tensor
    received: Tensor


@torch.inference_mode()
def pattern_changes(
    passes: Passes, patches: Sequence[Patch], looks: Mapping[Feature, Sequence[Look]]
) -> dict[Feature, list[dict[str, Any]]]:
    """By feature of queries, keys and values, one entry for each of its looks: what the feature adds to the attention
    patterns of its own layer, all deltas at full strength minus all but it. Empty where the model shows no patterns.

    `from` is the attention that the feature's token pays, `to` what later tokens of the context pay to it. Each has
    `sizes` by query head: of `from`, half the sum of |change| over all keys, which is the share of the token's
    attention that moves; of `to`, the mean |change| over the later tokens. `head` is the one where most moves, and
    `changes` are its changes by piece of the context: tokens of one piece summed as keys, the largest of them as
    queries. `before` is what the tokens before the context gain together.
    """
    found: dict[Feature, list[dict[str, Any]]] = {feature: [] for feature in looks}
    for site in sorted({site for site, _ in looks}):
        chosen = [(feature, look) for feature, several in looks.items() if feature[0] == site for look in several]
        changes = _changes(passes, patches, site, [(number, look) for (_, number), look in chosen])
        for (feature, look), change in zip(chosen, changes, strict=False):
            found[feature].append({"from": _paid(look, change.given), "to": _earned(look, change.received)})
    return found


def _changes(passes: Passes, patches: Sequence[Patch], site: Site, chosen: Sequence[tuple[int, Look]]) -> list[_Change]:
    """In the order of `chosen`, numbers of the site's features and looks; none where the patterns cannot be seen."""
    bridge, name = passes.bridge, f"blocks.{site.layer}.attn.hook_pattern"
    if name not in hook_names(bridge):
        return []
    below = [patch for patch in numbered(patches) if patch.site <= site]  # no others can matter
    (ours,) = (patch for patch in below if patch.site == site)
    order = sorted(range(len(chosen)), key=lambda i: chosen[i][1].end)
    found: dict[int, _Change] = {}
    with spliced(bridge, Edit(below, "full")) as splice:

        def run(some: Sequence[int]) -> None:
            # Attention is causal: what comes after the context changes nothing in it. Each text is there twice.
            rows = [list(chosen[i][1].ids[: chosen[i][1].end]) for i in some for _ in range(2)]
            kept = [ranks for i in some for ranks in (EVERY, only(ours, chosen[i][0], outside=True))]
            batch = pad_left(rows, bridge.tokenizer.pad_token_id).to(device_of(bridge))
            device, length = batch.ids.device, batch.ids.shape[1]

            def note(pattern: Tensor, hook: object) -> None:
                for place, i in enumerate(some):
                    look, (full, without) = chosen[i][1], pattern[2 * place : 2 * place + 2].float()
                    start = length - look.end
                    given, received = (
                        (full.select(way, start + look.peak) - without.select(way, start + look.peak))[:, start:].cpu()
                        for way in (1, 2)  # as a query, and as a key
                    )
                    found[i] = _Change(given, received)

            splice.reset(
                batch.editable,
                torch.ones(len(rows), device=device),
                RowEdits(kept=torch.tensor(kept, device=device), bos=batch.bos),
            )
            run_up_to(bridge, batch, site.layer, [(name, note)])

        in_slices(order, max(1, passes.batch_size // 2), run)
    return [found[i] for i in range(len(chosen))] if found else []  # some models have the hook and never run it


def _paid(look: Look, change: Tensor) -> dict[str, Any]:
    sizes = change.abs().sum(1) / 2
    head = int(sizes.argmax())
    by_piece = [float(one.sum()) for one in change[head, look.first :].split(list(look.counts))]
    before = round(float(change[head, : look.first].sum()), DIGITS)
    return {"sizes": rounded(sizes), "head": head, "changes": rounded(by_piece), "before": before}


def _earned(look: Look, change: Tensor) -> dict[str, Any]:
    change[:, : look.peak + 1] = 0.0  # no earlier token attends to it, and its attention to itself is in what it pays
    sizes = change.abs().sum(1) / max(1, look.end - look.peak - 1)
    head = int(sizes.argmax())
    pieces = change[head, look.first :].split(list(look.counts))
    by_piece = [float(one[one.abs().argmax()]) for one in pieces]
    return {"sizes": rounded(sizes), "head": head, "changes": rounded(by_piece)}


def heads_written(patch: Patch, feature: int, d_head: int) -> dict[str, list[float]]:
    """By `q`, `k` and `v`, the shares of a decoder row's square that lie in each head. The three differ in size, so
    each part of the row is measured against the mean square of the un-finetuned weights that write there."""
    assert patch.path is not None
    parts = patch.transcoder.W_dec[feature].float().square().split(patch.path.widths)
    found = {}
    for name, part in zip("qkv", parts, strict=True):
        weight: Any = patch.path.parts[f"attn.{name}"].weight
        found[name] = (part / weight.float().square().mean().clamp(min=1e-12)).view(-1, d_head).sum(1)
    whole = torch.stack([one.sum() for one in found.values()]).sum().clamp(min=1e-12)
    return {name: (one / whole).tolist() for name, one in found.items()}


def heads_read(patch: Patch, feature: int, mean_squares: Tensor, n_heads: int) -> list[float]:
    """The shares of an encoder column's square that lie in each head, each weight times the root mean square of z in
    its head; `mean_squares` (d_in,) are those of z over tokens. Empty for a feature that reads nothing, as at BOS."""
    column = patch.transcoder.W_enc[:, feature].float().square().view(n_heads, -1).sum(1)
    read = column * mean_squares.to(column).view(n_heads, -1).mean(1)
    return rounded(read / read.sum()) if read.sum() > 0 else []


def written_by_values(bridge: TransformerBridge, patch: Patch, feature: int, most: int) -> dict[int, Tensor]:
    """By head of values, what the feature's part there adds to the stream (d_model,) where each query head that shares
    the values attends to its token alone: through the finetuned model's own output projection, and the norm after it
    where there is one, applied to that vector by itself. Only the `most` heads with the largest shares; none where the
    model's output projection is not one of TransformerLens' parts.
    """
    assert patch.path is not None
    path = output_of_heads(bridge, patch.site.layer)
    if path is None:
        return {}
    n_heads, d_head = bridge.cfg.n_heads, path.d_in // bridge.cfg.n_heads
    row = patch.transcoder.W_dec[feature].float()
    values = row.split(patch.path.widths)[2].view(-1, d_head)
    shared = n_heads // len(values)
    found = {}
    with torch.inference_mode():
        nothing = path(row.new_zeros(1, path.d_in)).float()  # what biases add whatever is attended to
        for head in values.norm(dim=1).argsort(descending=True).tolist()[:most]:
            if values[head].any():
                z = row.new_zeros(n_heads, d_head)
                z[head * shared : (head + 1) * shared] = values[head]
                found[head] = (path(z.view(1, -1)).float() - nothing)[0]
    return found


def rounded(values: Tensor | Sequence[float]) -> list[float]:
    return [round(float(one), DIGITS) for one in values]

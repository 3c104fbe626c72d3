"""What delta features read and write: how often they fire, where, how strongly, and which tokens they move.

In: a model's passes, patches, rows, and features by site and number. Out: plain values, one entry per feature.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from data.encoding import encode_row, pad_left
from data.rows import Row
from evaluators.measures.attention_features import (
    Look,
    heads_read,
    heads_written,
    pattern_changes,
    written_by_values,
)
from evaluators.measures.single_features import Feature, activations
from evaluators.splice.interventions import Patch
from evaluators.splice.passes import Passes, project, read_prefixes, resume
from models.bridge import device_of
from sites import ATTENTION_OUT, QKV, Site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

CONTEXTS, TOKENS, BARS = 10, 8, 24
"""Contexts, tokens (promoted, and suppressed) and histogram bars stored per feature."""
WINDOW = 16
"""Tokens of a context on either side of the one that fires."""
LOOKS = 3
"""Contexts in which attention is compared with and without a feature."""
VALUE_HEADS = 2
"""Heads for which the values' tokens are stored."""
STEP = 0.01
"""Step along a decoder direction that measures its direct effect, as a fraction of the residual stream's norm."""
Key = TypeVar("Key", bound=Hashable)


class Text(NamedTuple):
    """A row's tokens, with the activations of some sites' deltas, (tokens, d_new), including BOS, and, for deltas that
    read the heads' outputs, the sums of squares (d_in,) of these after BOS."""

    row: Row
    ids: list[int]
    acts: Mapping[Site, Tensor]
    squares: Mapping[Site, Tensor]


@torch.inference_mode()
def firing_rates(passes: Passes, patches: Sequence[Patch], rows: Sequence[Row]) -> dict[Site, dict[str, list[float]]]:
    """By site and subset, the share of tokens after BOS on which each feature fires in the finetuned model's stream;
    for a BOS feature, the share of texts."""
    fired: dict[Site, dict[str, Tensor]] = {patch.site: {} for patch in patches}
    tokens: dict[str, int] = {}
    texts: dict[str, int] = {}
    for text in read_texts(passes, patches, rows):
        subset = text.row.label
        tokens[subset] = tokens.get(subset, 0) + len(text.ids) - 1
        texts[subset] = texts.get(subset, 0) + 1
        for site, acts in text.acts.items():
            fired[site][subset] = fired[site].get(subset, 0) + (acts > 0).sum(0).cpu()
    at_bos = {patch.site: only_at_bos(patch) for patch in patches}
    return {
        site: {
            subset: (by_subset[subset] / torch.where(at_bos[site], texts[subset], tokens[subset])).tolist()
            for subset in dict.fromkeys(row.label for row in rows)
        }
        for site, by_subset in fired.items()
    }


@torch.inference_mode()
def read_features(
    passes: Passes, patches: Sequence[Patch], rows: Sequence[Row], features: Sequence[Feature]
) -> dict[Feature, dict[str, Any]]:
    """For each feature: `at_bos`, whether it is active only at BOS; `contexts`, where it fires most strongly, at most
    one per text; `histogram` of its activations; `promoted` and `suppressed`, the tokens that its decoder row moves
    most through the final norm and the unembedding.

    A context has `subset`; `tokens` and `acts`, the pieces of text around the peak and the activations there; and
    `peak`, the place of the strongest activation. The histogram counts tokens in equal bars from 0 to `top`.
    Activations are those in the finetuned model's own stream.

    A feature of queries, keys and values moves no token by itself. It has `heads`, each head's share of its decoder
    row's squared norm; `patterns`, what it does to attention in the first `LOOKS` contexts
    (`attention_features.pattern_changes`); and `values`, the tokens that its values move when attended to, for the
    heads with the largest shares (`attention_features.written_by_values`). A feature of attention's output has `reads`,
    each head's share of what it reads.
    """
    sites = {site for site, _ in features}
    chosen = [patch for patch in patches if patch.site in sites]
    texts = list(read_texts(passes, chosen, rows))
    by_site = {patch.site: patch for patch in chosen}
    directions = {
        (site, feature): by_site[site].transcoder.W_dec[feature] for site, feature in features if site.kind.in_stream
    }
    moved = moved_tokens(passes.bridge, texts, directions)
    at_bos = {patch.site: only_at_bos(patch) for patch in chosen}
    tokenizer: Any = passes.bridge.tokenizer
    contexts = {
        feature: strongest_contexts(tokenizer, texts, [text.acts[feature[0]][:, feature[1]] for text in texts])
        for feature in features
    }
    looks = {feature: [look for _, look in pairs] for feature, pairs in contexts.items()}
    attention_entries = _of_attention(passes, patches, texts, looks)
    return {
        (site, feature): {
            "at_bos": bool(at_bos[site][feature]),
            "contexts": [context for context, _ in contexts[site, feature]],
            "histogram": _histogram(texts, site, feature),
            **moved.get((site, feature), {"promoted": [], "suppressed": []}),
            **attention_entries[site, feature],
        }
        for site, feature in features
    }


def _of_attention(
    passes: Passes, patches: Sequence[Patch], texts: Sequence[Text], looks: Mapping[Feature, Sequence[Look]]
) -> dict[Feature, dict[str, Any]]:
    """For each feature, the entries of `read_features` that only attention's features have."""
    config, by_site = passes.bridge.cfg, {patch.site: patch for patch in patches}
    entries: dict[Feature, dict[str, Any]] = {feature: {} for feature in looks}
    into_heads = [feature for feature in looks if feature[0].kind.name == QKV.name]
    patterns = pattern_changes(passes, patches, {feature: looks[feature][:LOOKS] for feature in into_heads})
    directions = {
        (feature, head): direction
        for feature in into_heads
        for head, direction in written_by_values(
            passes.bridge, by_site[feature[0]], feature[1], most=VALUE_HEADS
        ).items()
    }
    moved = moved_tokens(passes.bridge, texts, directions)
    for feature in into_heads:
        entries[feature] = {
            "heads": heads_written(by_site[feature[0]], feature[1], config.d_head),
            "patterns": patterns[feature],
            "values": [{"head": head, **tokens} for (writer, head), tokens in moved.items() if writer == feature],
        }
    n_tokens = sum(len(text.ids) - 1 for text in texts)
    for site, number in looks:
        if site.kind.name == ATTENTION_OUT.name:
            squares = torch.stack([text.squares[site] for text in texts]).sum(0) / n_tokens
            entries[site, number]["reads"] = heads_read(by_site[site], number, squares, config.n_heads)
    return entries


def read_texts(passes: Passes, patches: Sequence[Patch], rows: Sequence[Row]) -> Iterator[Text]:
    encoded = [encode_row(passes.bridge.tokenizer, row).ids for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i]))
    for start in range(0, len(order), passes.batch_size):
        batch = order[start : start + passes.batch_size]
        prefixes = read_prefixes(passes.bridge, [encoded[i] for i in batch], [patch.site for patch in patches])
        for index, i in enumerate(batch):
            acts = {patch.site: activations(patch, prefixes[patch.site][index].x) for patch in patches}
            squares = {
                patch.site: prefixes[patch.site][index].x[1:].float().square().sum(0)
                for patch in patches
                if patch.site.kind.name == ATTENTION_OUT.name
            }
            yield Text(rows[i], encoded[i], acts, squares)


def only_at_bos(patch: Patch) -> Tensor:
    at_bos = None if patch.path is None else patch.transcoder.at_bos
    return torch.zeros(patch.transcoder.d_sae, dtype=torch.bool) if at_bos is None else at_bos.cpu() > 0


def strongest_contexts(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[Text], activations: Sequence[Tensor], most: int = CONTEXTS
) -> list[tuple[dict[str, Any], Look]]:
    """Where something fires most, strongest first, each with its `Look`; `activations` holds (tokens,) of each text."""
    firing = []
    for number, (text, acts_in_text) in enumerate(zip(texts, activations, strict=True)):
        strength = float(acts_in_text.max())
        if strength > 0:
            firing.append((-strength, text.row.label, number))
    shown = []
    for _, _, number in sorted(firing)[:most]:
        text = texts[number]
        acts: list[float] = activations[number].tolist()
        peak_at = max(range(len(acts)), key=acts.__getitem__)
        first = max(0, peak_at - WINDOW)
        around = slice(first, peak_at + WINDOW + 1)
        counted = counted_pieces(tokenizer, text.ids[around])
        strengths = strongest(counted, acts[around])
        peak = max(range(len(strengths)), key=strengths.__getitem__)
        context = {
            "subset": text.row.label,
            "tokens": [piece for piece, _ in counted],
            "acts": strengths,
            "peak": peak,
        }
        shown.append((context, Look(text.ids, peak_at, first, [count for _, count in counted])))
    return shown


def counted_pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[tuple[str, int]]:
    """The piece of text that each token adds to the text before it, and its number of tokens: those that together form
    one character are one piece."""
    pieces: list[tuple[str, int]] = []
    before, count = "", 0
    for index in range(len(ids)):
        text: Any = tokenizer.decode(list(ids[: index + 1]), clean_up_tokenization_spaces=False)
        count += 1
        # A replacement character stands for part of a character, unless later tokens do not complete it.
        if text.endswith("\ufffd") and count < 4 and index + 1 < len(ids):
            continue
        pieces.append((text[len(before) :], count))
        before, count = text, 0
    return pieces


def strongest(counted: Sequence[tuple[str, int]], acts: Sequence[float]) -> list[float]:
    """The strongest activation in each piece."""
    strengths, done = [], 0
    for _, count in counted:
        strengths.append(round(max(0.0, *acts[done : done + count]), 4))
        done += count
    return strengths


def _histogram(texts: Sequence[Text], site: Site, feature: int) -> dict[str, Any]:
    acts = torch.cat([text.acts[site][:, feature] for text in texts]).float().cpu()
    active = acts[acts > 0]
    if not len(active):
        return {"top": 0.0, "counts": []}
    top = float(active.max())
    return {"top": top, "counts": [int(count) for count in torch.histc(active, BARS, 0.0, top)]}


def moved_tokens(
    bridge: TransformerBridge, texts: Sequence[Text], directions: Mapping[Key, Tensor]
) -> dict[Key, dict[str, list[str]]]:
    """For each direction (d_model,) the tokens whose logits a small step along it raises and lowers most.

    The step starts from the mean output of the last block at the ends of prompts, one from each subset.
    """
    if not directions:
        return {}
    first = {text.row.label: text for text in reversed(texts)}
    rows = [encode_row(bridge.tokenizer, text.row).prompt for text in first.values()]
    batch = pad_left(rows, bridge.tokenizer.pad_token_id).to(device_of(bridge))
    return moved_from(bridge, resume(bridge, batch)[:, -1].float().mean(0), directions)


def moved_from(
    bridge: TransformerBridge, at: Tensor, directions: Mapping[Key, Tensor]
) -> dict[Key, dict[str, list[str]]]:
    """For each direction (d_model,) the tokens whose logits a small step along it raises (`promoted`) and lowers
    (`suppressed`) most, from the last block's output `at` (d_model,)."""
    if not directions:
        return {}
    dtype = next(iter(bridge.original_model.parameters())).dtype  # type: ignore[operator]
    stacked = torch.stack([direction.float() for direction in directions.values()]).to(at)
    steps = functional.normalize(stacked, dim=1) * at.norm() * STEP
    moves: list[dict[str, list[str]]] = []
    # In chunks, so that memory does not grow with the number of features.
    for part in steps.split(64):
        up, down = (torch.cat([*project(bridge, (at + sign * part).to(dtype))]) for sign in (1, -1))
        for moved in up - down:
            promoted, suppressed = moved.topk(TOKENS).indices.tolist(), (-moved).topk(TOKENS).indices.tolist()
            names = [[bridge.tokenizer.decode([token]) for token in tokens] for tokens in (promoted, suppressed)]
            moves.append({"promoted": names[0], "suppressed": names[1]})
    return dict(zip(directions, moves, strict=True))

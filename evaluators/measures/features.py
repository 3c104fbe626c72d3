"""What delta features read and write: how often they fire, where, how strongly, and which tokens they move.

In: a model's passes, patches, rows, and features by site and number. Out: plain values, one entry a feature.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from data.encoding import encode_row, pad_left
from data.rows import Row
from evaluators.measures.single_features import Feature, activations
from evaluators.splice.interventions import Patch
from evaluators.splice.passes import Passes, project, read_prefixes, resume
from models.bridge import device_of
from sites import Site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

CONTEXTS, TOKENS, BARS = 10, 8, 24
"""Contexts, tokens (promoted, and suppressed) and bars of the histogram that are kept of a feature."""
WINDOW = 16
"""Tokens of a context on either side of the one that fires."""
STEP = 0.01
"""Of the residual stream's norm: the step along a decoder direction that measures its direct effect."""


class _Text(NamedTuple):
    """A row as it is run, with the activations of some sites' deltas, (tokens, d_new), BOS included."""

    row: Row
    ids: list[int]
    acts: Mapping[Site, Tensor]


@torch.inference_mode()
def firing_rates(passes: Passes, patches: Sequence[Patch], rows: Sequence[Row]) -> dict[Site, dict[str, list[float]]]:
    """By site and subset, the share of tokens after BOS on which each feature fires in the finetuned model's stream;
    of a feature at BOS, the share of texts."""
    fired: dict[Site, dict[str, Tensor]] = {patch.site: {} for patch in patches}
    tokens: dict[str, int] = {}
    texts: dict[str, int] = {}
    for text in _texts(passes, patches, rows):
        subset = text.row.label
        tokens[subset] = tokens.get(subset, 0) + len(text.ids) - 1
        texts[subset] = texts.get(subset, 0) + 1
        for site, acts in text.acts.items():
            fired[site][subset] = fired[site].get(subset, 0) + (acts > 0).sum(0).cpu()
    at_bos = {patch.site: _at_bos(patch) for patch in patches}
    return {
        site: {
            subset: (of_site[subset] / torch.where(at_bos[site], texts[subset], tokens[subset])).tolist()
            for subset in dict.fromkeys(row.label for row in rows)
        }
        for site, of_site in fired.items()
    }


@torch.inference_mode()
def read_features(
    passes: Passes, patches: Sequence[Patch], rows: Sequence[Row], features: Sequence[Feature]
) -> dict[Feature, dict[str, Any]]:
    """By feature: `at_bos`, whether it is active at BOS alone; `contexts`, where it fires most strongly, at most one a
    text; `histogram` of its activations; `promoted` and `suppressed`, the tokens that its decoder row moves most
    through the final norm and the unembedding.

    A context has `subset`, `tokens` and `acts`, the pieces of text around the strongest one and the activations there,
    and `peak`, the strongest one's place. A feature of queries, keys and values moves no token by itself: it has
    `heads` instead, the share of its decoder row's square in each head of each. The histogram counts tokens in equal
    bars from 0 to `top`. Activations are those in the finetuned model's own stream.
    """
    sites = {site for site, _ in features}
    chosen = [patch for patch in patches if patch.site in sites]
    texts = list(_texts(passes, chosen, rows))
    by_site = {patch.site: patch for patch in chosen}
    written = [one for one in features if one[0].kind.in_stream]
    moved = _moved_tokens(passes.bridge, by_site, texts, written) if written else {}
    at_bos = {patch.site: _at_bos(patch) for patch in chosen}
    tokenizer: Any = passes.bridge.tokenizer
    return {
        (site, feature): {
            "at_bos": bool(at_bos[site][feature]),
            "contexts": _contexts(tokenizer, texts, site, feature),
            "histogram": _histogram(texts, site, feature),
            **moved.get((site, feature), {"promoted": [], "suppressed": []}),
            **({} if site.kind.in_stream else {"heads": _shares(by_site[site], feature, passes.bridge.cfg.d_head)}),
        }
        for site, feature in features
    }


def _texts(passes: Passes, patches: Sequence[Patch], rows: Sequence[Row]) -> Iterator[_Text]:
    encoded = [encode_row(passes.bridge.tokenizer, row).ids for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(encoded[i]))
    for start in range(0, len(order), passes.batch_size):
        batch = order[start : start + passes.batch_size]
        found = read_prefixes(passes.bridge, [encoded[i] for i in batch], [patch.site for patch in patches])
        for place, i in enumerate(batch):
            acts = {patch.site: activations(patch, found[patch.site][place].x) for patch in patches}
            yield _Text(rows[i], encoded[i], acts)


def _shares(patch: Patch, feature: int, d_head: int) -> dict[str, list[float]]:
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


def _at_bos(patch: Patch) -> Tensor:
    own = None if patch.path is None else patch.transcoder.at_bos
    return torch.zeros(patch.transcoder.d_sae, dtype=torch.bool) if own is None else own.cpu() > 0


def _contexts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[_Text], site: Site, feature: int) -> list[dict]:
    found = []
    for number, text in enumerate(texts):
        strength = float(text.acts[site][:, feature].max())
        if strength > 0:
            found.append((-strength, text.row.label, number))
    shown = []
    for _, _, number in sorted(found)[:CONTEXTS]:
        text = texts[number]
        acts: list[float] = text.acts[site][:, feature].tolist()
        middle = max(range(len(acts)), key=acts.__getitem__)
        around = slice(max(0, middle - WINDOW), middle + WINDOW + 1)
        pieces, strengths = pieces_of(tokenizer, text.ids[around], acts[around])
        peak = max(range(len(strengths)), key=strengths.__getitem__)
        shown.append({"subset": text.row.label, "tokens": pieces, "acts": strengths, "peak": peak})
    return shown


def pieces_of(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], acts: Sequence[float]
) -> tuple[list[str], list[float]]:
    """The pieces of text that tokens add to those before them, and their activations; tokens that are parts of one
    character become one piece, with the strongest activation."""
    pieces: list[str] = []
    strengths: list[float] = []
    said, held, strongest = "", 0, 0.0
    for place, act in enumerate(acts):
        text: Any = tokenizer.decode(list(ids[: place + 1]), clean_up_tokenization_spaces=False)
        held, strongest = held + 1, max(strongest, act)
        # A replacement sign is a part of a character, unless it stays one.
        if text.endswith("\ufffd") and held < 4 and place + 1 < len(ids):
            continue
        pieces.append(text[len(said) :])
        strengths.append(round(strongest, 4))
        said, held, strongest = text, 0, 0.0
    return pieces, strengths


def _histogram(texts: Sequence[_Text], site: Site, feature: int) -> dict[str, Any]:
    acts = torch.cat([text.acts[site][:, feature] for text in texts]).float().cpu()
    active = acts[acts > 0]
    if not len(active):
        return {"top": 0.0, "counts": []}
    top = float(active.max())
    return {"top": top, "counts": [int(one) for one in torch.histc(active, BARS, 0.0, top)]}


def _moved_tokens(
    bridge: TransformerBridge, patches: Mapping[Site, Patch], texts: Sequence[_Text], features: Sequence[Feature]
) -> dict[Feature, dict[str, list[str]]]:
    """For each feature the tokens whose logits a small step along its decoder row raises and lowers most.

    The step starts at the mean residual stream that leaves the last block at the ends of texts, one of each subset.
    """
    first = {text.row.label: text for text in reversed(texts)}
    rows = [encode_row(bridge.tokenizer, text.row).prompt for text in first.values()]
    batch = pad_left(rows, bridge.tokenizer.pad_token_id).to(device_of(bridge))
    at = resume(bridge, batch)[:, -1].float().mean(0)
    dtype = next(iter(bridge.original_model.parameters())).dtype  # type: ignore[operator]
    directions = torch.stack([patches[site].transcoder.W_dec[feature].float() for site, feature in features]).to(at)
    steps = functional.normalize(directions, dim=1) * at.norm() * STEP
    found = {}
    done = 0
    # Both ends of a step in one chunk of logits, so that memory holds one chunk whatever the number of features.
    for part in steps.split(64):
        up, down = (torch.cat([*project(bridge, (at + sign * part).to(dtype))]) for sign in (1, -1))
        for moved in up - down:
            promoted, suppressed = moved.topk(TOKENS).indices.tolist(), (-moved).topk(TOKENS).indices.tolist()
            names = [[bridge.tokenizer.decode([token]) for token in tokens] for tokens in (promoted, suppressed)]
            found[features[done]] = {"promoted": names[0], "suppressed": names[1]}
            done += 1
    return found

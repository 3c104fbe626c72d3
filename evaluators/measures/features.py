"""What the delta learnt: each feature's firing, contexts, direct effect on tokens, and what its ablation changes.

In: a model's passes, one site, rows, and how many features to ablate. Out: plain values, one entry a feature. The
features are ranked by a first-order estimate (activation times gradient); the first of them are then ablated one at a
time, as rows of the same batches. A text on which a feature never fires is the same without it and is not run again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from data.encoding import Encoded, encode_row, pad_left
from data.rows import Row
from evaluators.measures.behaviours import Answer, Behaviour
from evaluators.splice.decoding import Stop, generate
from evaluators.splice.interventions import Edit, RowEdits, Site, spliced
from evaluators.splice.limits import Limits
from evaluators.splice.passes import Passes, project, resume
from evaluators.splice.teacher_forcing import Job, score
from models.bridge import device_of, read_input
from models.transcoder import Transcoder

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

CONTEXTS, TOKENS = 3, 6
"""Contexts and tokens (promoted, and suppressed) kept a feature."""
WINDOW = 12
"""Tokens of a context on either side of the one that fires."""
STEP = 0.01
"""Of the residual stream's norm: the step along a decoder direction that measures its direct effect."""


class Text(NamedTuple):
    """A row as it is run: its place in the subset, token ids, and the delta's activations after BOS (tokens, d_new)."""

    row: Row
    number: int
    encoded: Encoded
    acts: Tensor


@torch.no_grad()  # not inference_mode: a gradient is taken within
def evaluate_features(
    passes: Passes,
    site: Site,
    rows: Sequence[Row],
    *,
    ablations: int,
    limits: Limits,
    behaviours: Mapping[str, Behaviour],
) -> list[dict[str, Any]]:
    """One entry for every delta feature, in the order of the decoder's rows.

    `firing_rate`: by subset, the share of tokens after BOS on which it fires. `contexts`: where it fires most strongly,
    the token in guillemets. `promoted`, `suppressed`: tokens that its decoder direction moves most, through the final
    norm and the unembedding. `attribution`: nats a target token that ablating it would add, to first order. `ablation`:
    for the `ablations` features of largest |attribution| that fire at all, by subset one entry a prompt with `nll`,
    `nll_full`, `n_tokens`, `behaviours`, `behaviours_full`; None for the others. Raises ValueError for a site without a
    delta.
    """
    if site.delta is None:
        raise ValueError(f"layer {site.layer} has no delta whose features could be read")
    passes = replace(passes, prefixes=passes.with_prefixes(site.layer, site.taps))
    bridge = passes.bridge
    texts = _texts(passes, site, site.delta, rows)
    attribution = _attribution(passes, site, site.delta, texts)
    moved = _moved_tokens(bridge, site.delta, texts)
    fires = torch.stack([(text.acts > 0).any(0) for text in texts]).any(0)
    ranked = attribution.abs().masked_fill(~fires, -1.0).argsort(descending=True).tolist()
    chosen = [feature for feature in ranked if fires[feature]][:ablations]
    measured = _ablate(passes, site, texts, chosen, Judge(Stop.of(bridge, limits, rows[0]), behaviours))
    return [
        {
            "feature": feature,
            "firing_rate": _firing_rates(texts, feature),
            "contexts": _contexts(bridge, texts, feature),
            "attribution": attribution[feature].item(),
            **moved[feature],
            "ablation": measured.get(feature),
        }
        for feature in range(site.delta.d_sae)
    ]


def _texts(passes: Passes, site: Site, delta: Transcoder, rows: Sequence[Row]) -> list[Text]:
    encoded = [encode_row(passes.bridge.tokenizer, row) for row in rows]
    found = passes.with_prefixes(site.layer, site.taps).get(site.layer, [row.ids for row in encoded])
    seen: dict[str, int] = {}
    texts = []
    for row, tokens, prefix in zip(rows, encoded, found, strict=True):
        index = seen.get(row.label, 0)
        seen[row.label] = index + 1
        texts.append(Text(row, index, tokens, delta.encode(read_input(site.taps, prefix.x[1:]))))
    return texts


def _firing_rates(texts: Sequence[Text], feature: int) -> dict[str, float]:
    rates = {}
    for subset in dict.fromkeys(text.row.label for text in texts):
        here = [text.acts[:, feature] > 0 for text in texts if text.row.label == subset]
        rates[subset] = torch.cat(here).float().mean().item()
    return rates


def _contexts(bridge: TransformerBridge, texts: Sequence[Text], feature: int) -> list[dict[str, Any]]:
    """The strongest firing of each text, the strongest texts first."""
    found = []
    for text in texts:
        token = int(text.acts[:, feature].argmax())
        if (strength := text.acts[token, feature].item()) > 0:
            found.append((strength, token + 1, text))  # BOS has no activations
    found.sort(key=lambda one: (-one[0], one[2].row.label, one[2].number))
    shown = []
    for strength, place, text in found[:CONTEXTS]:
        ids = text.encoded.ids
        before, after = ids[max(1, place - WINDOW) : place], ids[place + 1 : place + 1 + WINDOW]
        parts = [bridge.tokenizer.decode(part) for part in (before, [ids[place]], after)]
        shown.append({"subset": text.row.label, "activation": strength, "text": f"{parts[0]}«{parts[1]}»{parts[2]}"})
    return shown


def _attribution(passes: Passes, site: Site, delta: Transcoder, texts: Sequence[Text]) -> Tensor:
    """(d_new,) nats a target token that ablating each feature would add: minus its activation times the gradient."""
    bridge, prefixes = passes.bridge, passes.with_prefixes(site.layer, site.taps)
    total = torch.zeros(delta.d_sae)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i].encoded.ids))
    for start in range(0, len(order), passes.batch_size):
        chosen = [texts[i] for i in order[start : start + passes.batch_size]]
        batch = pad_left([text.encoded.ids for text in chosen], bridge.tokenizer.pad_token_id).to(device_of(bridge))
        length = batch.ids.shape[1]
        with spliced(bridge, Edit((site,), "full"), above_first=True) as splice:
            strengths = torch.ones(len(chosen), device=batch.ids.device)
            splice.reset(batch.editable, strengths, RowEdits(bos=batch.bos))
            found = prefixes.get(site.layer, [text.encoded.ids for text in chosen])
            residual = splice.start(found, range(len(chosen)), length)
        columns = torch.cat([torch.arange(length - len(text.encoded.target), length) for text in chosen])
        lines = torch.repeat_interleave(
            torch.arange(len(chosen)), torch.tensor([len(text.encoded.target) for text in chosen])
        )
        gradient = _gradient(bridge, batch, site.layer, residual, lines, columns)
        for place, text in enumerate(chosen):
            here = gradient[place, length - len(text.acts) :] @ delta.W_dec.T  # (tokens, d_new)
            total -= (text.acts * here).sum(0).cpu()
    return total / sum(len(text.encoded.target) for text in texts)


def _gradient(
    bridge: TransformerBridge, batch: Any, layer: int, residual: Tensor, lines: Tensor, columns: Tensor
) -> Tensor:
    """Of the summed cross-entropy at (lines, columns) with respect to what leaves the layer: like `residual`, fp32."""
    with torch.enable_grad():
        leaf = residual.clone().requires_grad_()
        last = resume(bridge, batch, layer, leaf)
        labels = batch.ids[lines, columns]
        loss, done = leaf.new_zeros(()), 0
        for logits in project(bridge, last[lines, columns - 1]):
            loss = loss + functional.cross_entropy(logits, labels[done : done + len(logits)], reduction="sum")
            done += len(logits)
        (gradient,) = torch.autograd.grad(loss, leaf)
    return gradient.float()


def _moved_tokens(bridge: TransformerBridge, delta: Transcoder, texts: Sequence[Text]) -> list[dict[str, list[str]]]:
    """For each feature the tokens whose logits a small step along its decoder direction raises and lowers most.

    The step starts at the mean residual stream that leaves the last block at the ends of the prompts.
    """
    rows = [text.encoded.prompt for text in texts]
    batch = pad_left(rows, bridge.tokenizer.pad_token_id).to(device_of(bridge))
    at = resume(bridge, batch)[:, -1].float().mean(0)
    directions = functional.normalize(delta.W_dec.to(at), dim=1) * at.norm() * STEP
    dtype = next(iter(bridge.original_model.parameters())).dtype  # type: ignore[operator]
    found = []
    up, down = (torch.cat([*project(bridge, (at + sign * directions).to(dtype))]) for sign in (1, -1))
    for moved in up - down:
        promoted, suppressed = moved.topk(TOKENS).indices.tolist(), (-moved).topk(TOKENS).indices.tolist()
        names = [[bridge.tokenizer.decode([token]) for token in tokens] for tokens in (promoted, suppressed)]
        found.append({"promoted": names[0], "suppressed": names[1]})
    return found


class Judge(NamedTuple):
    """Where a generation ends, and what is asked of it."""

    stop: Stop
    behaviours: Mapping[str, Behaviour]

    def __call__(self, row: Row, tokens: list[int]) -> dict[str, bool | None]:
        answer = Answer(row.input, row.target, row.label, self.stop.text(tokens), len(tokens))
        return {name: one(answer) for name, one in self.behaviours.items()}


def _ablate(
    passes: Passes, site: Site, texts: Sequence[Text], features: Sequence[int], judge: Judge
) -> dict[int, dict[str, list[dict[str, Any]]]]:
    """By feature and subset, one entry a prompt: figures of `full`, and of `full` without the feature."""
    if not features:
        return {}
    edit, stop = Edit((site,), "full"), judge.stop
    full = [Job(text.encoded) for text in texts]
    scored = score(passes, edit, full)
    outputs = generate(passes, edit, full, scored, stop)
    written = [[*text.encoded.prompt, *output] for text, output in zip(texts, outputs, strict=True)]
    assert site.delta is not None
    read = passes.with_prefixes(site.layer, site.taps).get(site.layer, written)
    fired = [(site.delta.encode(read_input(site.taps, one.x[1:])) > 0).any(0) for one in read]
    # Where a feature fires neither on the target's text nor on the output's, nothing changes.
    pairs = [
        (feature, number)
        for feature in features
        for number, text in enumerate(texts)
        if fired[number][feature] or (text.acts[:, feature] > 0).any()
    ]
    jobs = [Job(texts[number].encoded, ablated=feature, guess=outputs[number]) for feature, number in pairs]
    without = score(passes, edit, jobs)
    rewritten = generate(passes, edit, jobs, without, stop)
    changed = {pair: (one, tokens) for pair, one, tokens in zip(pairs, without, rewritten, strict=True)}
    result: dict[int, dict[str, list[dict[str, Any]]]] = {}
    for feature in features:
        for number, text in enumerate(texts):
            one, tokens = changed.get((feature, number), (scored[number], outputs[number]))
            entry = {
                "index": text.number,
                "nll": one.nll,
                "nll_full": scored[number].nll,
                "n_tokens": one.n_tokens,
                "behaviours": judge(text.row, tokens),
                "behaviours_full": judge(text.row, outputs[number]),
            }
            result.setdefault(feature, {}).setdefault(text.row.label, []).append(entry)
    return result

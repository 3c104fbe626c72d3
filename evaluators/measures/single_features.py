"""What one feature does alone: all deltas without it, and it on the ground without the others.

In: a model's passes, sites, rows, and features by layer and number. Out: by feature, one entry a prompt and way. An
edit is added to the residual stream, so what leaves the feature's own layer follows from one shared pass: the stream
there, less (or plus) its activation times its decoder row. Only the layers above run for each feature, and only texts
on which it fires; where such a pass proves that the output stays, nothing is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from data.encoding import Encoded, encode_row, pad_left, target_text
from data.rows import Row
from evaluators.measures.behaviours import Answer, Behaviour
from evaluators.splice.batching import in_slices
from evaluators.splice.decoding import Stop, generate
from evaluators.splice.interventions import Edit, Ranks, RowEdits, Site, spliced
from evaluators.splice.limits import Limits
from evaluators.splice.passes import Passes, project, read_prefixes, resume
from evaluators.splice.teacher_forcing import Job, Scored, score
from models.bridge import device_of, read_input

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

WAYS = {"ablated": "full", "alone": "no_delta"}
"""Each way to look at a feature, and the condition that it is held against."""

Feature = tuple[int, int]
"""A layer, and a row of its delta's decoder."""
Guesses = Mapping[str, Sequence[Sequence[int]]]
"""By condition, what the outputs of the rows may be, in the order of the rows."""


class Judge(NamedTuple):
    """Where a generation ends, and what is asked of it."""

    stop: Stop
    behaviours: Mapping[str, Behaviour]

    def __call__(self, row: Row, tokens: list[int]) -> dict[str, bool | None]:
        target = target_text(self.stop.tokenizer, row)
        answer = Answer(row.input, target, row.label, self.stop.text(tokens), len(tokens))
        return {name: one(answer) for name, one in self.behaviours.items()}


class _Whole(NamedTuple):
    """A row under the condition that features are held against: its figures, and its output."""

    encoded: Encoded
    scored: Scored
    output: list[int]

    @property
    def texts(self) -> list[Encoded]:
        """What a pass must run over: the target, whose cross-entropy is asked, and the output where it is another."""
        written = Encoded(self.encoded.prompt, self.output)
        return [self.encoded] if written.target == self.encoded.target else [self.encoded, written]


class _Stream(NamedTuple):
    """A text at a feature's layer: the delta's activations (tokens, d_new), and what leaves the block, (tokens,
    d_model)."""

    acts: Tensor
    output: Tensor


class _Run(NamedTuple):
    """One text without, or with, one feature: nats over the text's answer, and the model's choice at each token."""

    nll: float
    argmax: list[int]


def single_features(
    passes: Passes,
    sites: Sequence[Site],
    rows: Sequence[Row],
    features: Sequence[Feature],
    *,
    limits: Limits,
    behaviours: Mapping[str, Behaviour],
    guesses: Guesses | None = None,
) -> dict[Feature, dict[str, list[dict[str, Any]]]]:
    """By feature, for each of `WAYS` one entry a row: `nll` and `n_tokens` of the target, `behaviours` of the output,
    and `nll_whole` and `behaviours_whole` under the condition that the way is held against.

    Raises ValueError for a feature that no site has.
    """
    deltas = {site.layer: site.delta for site in sites if site.delta is not None}
    for layer, number in features:
        if layer not in deltas or not 0 <= number < deltas[layer].d_sae:
            raise ValueError(f"no delta has a feature {number} in layer {layer}")
    judge = Judge(Stop.of(passes.bridge, limits, rows[0]), behaviours)
    found: dict[Feature, dict[str, list[dict[str, Any]]]] = {feature: {} for feature in features}
    for way, condition in WAYS.items():
        wholes = _wholes(passes, Edit(sites, condition), rows, judge.stop, (guesses or {}).get(condition, ()))
        runs = _runs(passes, sites, condition, wholes, features)
        outputs = _outputs(passes, sites, way, wholes, runs, judge.stop)
        for feature in features:
            found[feature][way] = [
                {
                    "subset": row.label,
                    "nll": runs[feature, place, 0].nll if (feature, place, 0) in runs else whole.scored.nll,
                    "nll_whole": whole.scored.nll,
                    "n_tokens": whole.scored.n_tokens,
                    "behaviours": judge(row, outputs.get((feature, place), whole.output)),
                    "behaviours_whole": judge(row, whole.output),
                }
                for place, (row, whole) in enumerate(zip(rows, wholes, strict=True))
            ]
    return found


def _wholes(
    passes: Passes, edit: Edit, rows: Sequence[Row], stop: Stop, guesses: Sequence[Sequence[int]]
) -> list[_Whole]:
    encoded = [encode_row(passes.bridge.tokenizer, row) for row in rows]
    jobs = [Job(one, guess=guesses[place] if guesses else ()) for place, one in enumerate(encoded)]
    scored = score(passes, edit, jobs)
    outputs = generate(passes, edit, jobs, scored, stop)
    return [_Whole(*one) for one in zip(encoded, scored, outputs, strict=True)]


@torch.inference_mode()
def _runs(
    passes: Passes, sites: Sequence[Site], condition: str, wholes: Sequence[_Whole], features: Sequence[Feature]
) -> dict[tuple[Feature, int, int], _Run]:
    """By feature, row and number of the row's text; none where the feature does not fire on the text."""
    texts = [(place, number, text) for place, whole in enumerate(wholes) for number, text in enumerate(whole.texts)]
    texts.sort(key=lambda one: len(one[2].ids))
    found: dict[tuple[Feature, int, int], _Run] = {}

    def of_texts(chosen: Sequence[tuple[int, int, Encoded]]) -> None:
        streams = _streams(passes.bridge, Edit(sites, condition), [text for *_, text in chosen], features)
        for layer in dict.fromkeys(layer for layer, _ in features):
            pairs = [  # text by text, so that a batch has texts of one length
                (feature, place)
                for place, stream in enumerate(streams[layer])
                for feature in features
                if feature[0] == layer and stream.acts[:, feature[1]].any()
            ]

            def of_pairs(some: Sequence[tuple[Feature, int]], layer: int = layer) -> None:
                runs = _above(passes.bridge, sites, condition, layer, some, streams[layer], [one[2] for one in chosen])
                found.update(
                    ((feature, *chosen[place][:2]), run) for (feature, place), run in zip(some, runs, strict=True)
                )

            in_slices(pairs, passes.batch_size, of_pairs)

    in_slices(texts, passes.batch_size, of_texts)
    return found


def _streams(
    bridge: TransformerBridge, edit: Edit, texts: Sequence[Encoded], features: Sequence[Feature]
) -> dict[int, list[_Stream]]:
    """By layer of the features, each text under the condition."""
    layers = sorted({layer for layer, _ in features})
    rows = [text.ids for text in texts]
    batch = pad_left(rows, bridge.tokenizer.pad_token_id).to(device_of(bridge))
    with spliced(bridge, edit) as splice:
        splice.reset(batch.editable, torch.ones(len(rows), device=batch.ids.device), RowEdits(bos=batch.bos))
        prefixes = read_prefixes(bridge, rows, layers, edit.sites[0].taps)
    by_layer = {site.layer: site for site in edit.sites}
    return {
        layer: [_Stream(activations(by_layer[layer], one.x), one.output) for one in prefixes[layer]] for layer in layers
    }


def activations(site: Site, x: Tensor) -> Tensor:
    """(tokens, d_new) of a site's delta on a text, BOS included, from what its input tap holds, (tokens, d_model)."""
    assert site.delta is not None
    acts = site.delta.encode(read_input(site.taps, x))
    at_bos = None if site.path is None else site.delta.at_bos
    acts[0] = 0.0 if at_bos is None else at_bos
    return acts


def _above(
    bridge: TransformerBridge,
    sites: Sequence[Site],
    condition: str,
    layer: int,
    pairs: Sequence[tuple[Feature, int]],
    streams: Sequence[_Stream],
    texts: Sequence[Encoded],
) -> list[_Run]:
    """A run for each pair of a feature of `layer` and a text, from what leaves the layer."""
    (delta,) = (site.delta for site in sites if site.layer == layer)
    assert delta is not None
    sign = -1.0 if condition == "full" else 1.0
    rows = [texts[place] for _, place in pairs]
    batch = pad_left([row.ids for row in rows], bridge.tokenizer.pad_token_id).to(device_of(bridge))
    length = batch.ids.shape[1]
    residual = streams[0].output.new_zeros(len(rows), length, delta.d_model)
    for line, ((_, feature), place) in enumerate(pairs):
        acts, output = streams[place]
        moved = output.float() + sign * acts[:, feature, None].float() * delta.W_dec[feature].float()
        residual[line, length - len(output) :] = moved.to(output.dtype)
    above = [site for site in sites if site.layer > layer]
    with spliced(bridge, Edit(above, condition)) if above else nullcontext() as splice:
        if splice is not None:
            splice.reset(batch.editable, torch.ones(len(rows), device=batch.ids.device), RowEdits(bos=batch.bos))
        last = resume(bridge, batch, layer, residual)
        return list(_answers(bridge, last, batch.ids, [len(row.target) for row in rows]))


def _answers(bridge: TransformerBridge, last: Tensor, ids: Tensor, counts: Sequence[int]) -> Iterator[_Run]:
    """Of what leaves the last block, (row, position, d_model): a run for each row's last `counts` tokens."""
    length = ids.shape[1]
    columns = torch.cat([torch.arange(length - count, length) for count in counts]).to(ids.device)
    lines = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(ids.device)
    labels, done = ids[lines, columns], 0
    nlls, choices = [], []
    for logits in project(bridge, last[lines, columns - 1]):
        nlls.append(functional.cross_entropy(logits, labels[done : done + len(logits)], reduction="none"))
        choices.append(logits.argmax(-1))
        done += len(logits)
    of_rows = zip(
        torch.cat(nlls).double().cpu().split(list(counts)), torch.cat(choices).split(list(counts)), strict=True
    )
    for nll, argmax in of_rows:
        yield _Run(nll.sum().item(), argmax.tolist())


def _outputs(
    passes: Passes,
    sites: Sequence[Site],
    way: str,
    wholes: Sequence[_Whole],
    runs: Mapping[tuple[Feature, int, int], _Run],
    stop: Stop,
) -> dict[tuple[Feature, int], list[int]]:
    """By feature and row, the outputs that a feature changes, decoded from where they leave the others'."""
    changed = []
    for (feature, place, text), run in runs.items():
        whole = wholes[place]
        if text == len(whole.texts) - 1 and run.argmax != whole.output:
            changed.append((feature, place, run))
    if not changed:
        return {}
    ranked = [replace(site, ranks=_numbers(site, sites)) for site in sites]
    jobs, scored = [], []
    for (layer, number), place, run in changed:
        (site,) = (one for one in ranked if one.layer == layer)
        assert site.ranks is not None
        rank = int(site.ranks[number])
        whole, kept = wholes[place], Ranks(rank, rank + 1, outside=way == "ablated")
        jobs.append(Job(whole.texts[-1], kept=kept))
        scored.append(whole.scored._replace(argmax=run.argmax, guessed=[]))  # what decoding starts from
    outputs = generate(passes, Edit(ranked, "full"), jobs, scored, stop)
    return {(feature, place): output for (feature, place, _), output in zip(changed, outputs, strict=True)}


def _numbers(site: Site, sites: Sequence[Site]) -> Tensor:
    """Ranks that only tell features apart: the place of each in a row of all sites' features."""
    first = sum(one.delta.d_sae for one in sites if one.layer < site.layer and one.delta is not None)
    assert site.delta is not None
    return torch.arange(first, first + site.delta.d_sae, device=site.delta.W_dec.device)

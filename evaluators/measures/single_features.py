"""What one feature does: all deltas without it, and it alone on the ground.

In: a model's passes, patches, rows, and features by site and number. Out: for each feature, one entry per prompt and
way. One shared pass gives what is the same for all features. An MLP's feature writes to the residual stream, so its
block's output follows from that of the shared pass: minus (or plus) its activation times its decoder row. For a feature
of attention its own block runs again. Then only the layers above run for each feature, and only for texts on which it
fires; nothing is decoded if a pass proves that the output does not change.
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
from evaluators.splice.decoding import Stop, generate
from evaluators.splice.interventions import Edit, Patch, Ranks, RowEdits, padded, spliced, starts_above
from evaluators.splice.limits import Limits
from evaluators.splice.passes import Passes, in_slices, project, read_entering, read_prefixes, resume
from evaluators.splice.teacher_forcing import Job, Scored, prepare, score
from models.bridge import device_of
from sites import Site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

WAYS = {"ablated": "full", "alone": "no_delta"}
"""The two ways to measure a feature, and the condition that each is compared with."""

Feature = tuple[Site, int]
"""A site, and a row of its delta's decoder."""
Guesses = Mapping[str, Sequence[Sequence[int]]]
"""By condition, likely outputs of the rows, in their order."""


class Judge(NamedTuple):
    """Where a generation ends, and the behaviours that it is checked for."""

    stop: Stop
    behaviours: Mapping[str, Behaviour]

    def __call__(self, row: Row, tokens: list[int]) -> dict[str, bool | None]:
        target = target_text(self.stop.tokenizer, row)
        answer = Answer(row.input, target, row.label, self.stop.text(tokens), len(tokens))
        return {name: behaviour(answer) for name, behaviour in self.behaviours.items()}


class _Baseline(NamedTuple):
    """A row under the condition that features are compared with: its figures, and its output."""

    encoded: Encoded
    scored: Scored
    output: list[int]

    @property
    def texts(self) -> list[Encoded]:
        """The texts that a pass must run over: the target, for its cross-entropy, and the output if it differs."""
        written = Encoded(self.encoded.prompt, self.output)
        return [self.encoded] if written.target == self.encoded.target else [self.encoded, written]


class _Stream(NamedTuple):
    """A text at a feature's site: the delta's activations (tokens, d_new), and the stream (tokens, d_model) from which
    runs start: what leaves the block if they start above it, else what enters it (None at block 0)."""

    acts: Tensor
    start: Tensor | None


class _Run(NamedTuple):
    """One text without, or with, one feature: nats over the text's answer, and the model's choice at each token."""

    nll: float
    argmax: list[int]


def single_features(
    passes: Passes,
    patches: Sequence[Patch],
    rows: Sequence[Row],
    features: Sequence[Feature],
    *,
    limits: Limits,
    behaviours: Mapping[str, Behaviour],
    guesses: Guesses | None = None,
) -> dict[Feature, dict[str, list[dict[str, Any]]]]:
    """By feature, for each of `WAYS` one entry per row: `nll` and `n_tokens` of the target, `behaviours` of the output,
    and `nll_whole` and `behaviours_whole` under the condition that the way is compared with.

    Raises ValueError for a feature that no patch has.
    """
    widths = {patch.site: patch.transcoder.d_sae for patch in patches if patch.delta is not None}
    for site, number in features:
        if not 0 <= number < widths.get(site, 0):
            raise ValueError(f"no delta has a feature {number} in layer {site.label}")
    judge = Judge(Stop.of(passes.bridge, limits, rows[0]), behaviours)
    effects: dict[Feature, dict[str, list[dict[str, Any]]]] = {feature: {} for feature in features}
    for way, condition in WAYS.items():
        baselines = _baselines(passes, Edit(patches, condition), rows, judge.stop, (guesses or {}).get(condition, ()))
        runs = _runs(passes, patches, condition, baselines, features)
        outputs = _outputs(passes, patches, way, baselines, runs, judge.stop)
        for feature in features:
            effects[feature][way] = [
                {
                    "subset": row.label,
                    "nll": runs[feature, index, 0].nll if (feature, index, 0) in runs else baseline.scored.nll,
                    "nll_whole": baseline.scored.nll,
                    "n_tokens": baseline.scored.n_tokens,
                    "behaviours": judge(row, outputs.get((feature, index), baseline.output)),
                    "behaviours_whole": judge(row, baseline.output),
                }
                for index, (row, baseline) in enumerate(zip(rows, baselines, strict=True))
            ]
    return effects


def _baselines(
    passes: Passes, edit: Edit, rows: Sequence[Row], stop: Stop, guesses: Sequence[Sequence[int]]
) -> list[_Baseline]:
    encoded = [encode_row(passes.bridge.tokenizer, row) for row in rows]
    jobs = [Job(row, guess=guesses[index] if guesses else ()) for index, row in enumerate(encoded)]
    scored = score(passes, edit, jobs)
    outputs = generate(passes, edit, jobs, scored, stop)
    scored = [row._replace(context=None) for row in scored]  # of the baseline, and no longer needed
    return [_Baseline(*columns) for columns in zip(encoded, scored, outputs, strict=True)]


@torch.inference_mode()
def _runs(
    passes: Passes,
    patches: Sequence[Patch],
    condition: str,
    baselines: Sequence[_Baseline],
    features: Sequence[Feature],
) -> dict[tuple[Feature, int, int], _Run]:
    """Runs by feature, row and number of the row's text; left out if the feature does not fire on the text."""
    texts = [
        (index, number, text) for index, baseline in enumerate(baselines) for number, text in enumerate(baseline.texts)
    ]
    texts.sort(key=lambda entry: len(entry[2].ids))
    by_text: dict[tuple[Feature, int, int], _Run] = {}

    def run_texts(chosen: Sequence[tuple[int, int, Encoded]]) -> None:
        streams = _streams(passes.bridge, Edit(patches, condition), [text for *_, text in chosen], features)
        for site in dict.fromkeys(site for site, _ in features):
            pairs = [  # text by text, so that the texts of a batch are equally long
                (feature, index)
                for index, stream in enumerate(streams[site])
                for feature in features
                if feature[0] == site and stream.acts[:, feature[1]].any()
            ]

            def run_pairs(pairs: Sequence[tuple[Feature, int]], site: Site = site) -> None:
                positions = [text for *_, text in chosen]
                run = _above if starts_above(site) else _through
                runs = run(passes.bridge, patches, condition, site, pairs, streams[site], positions)
                by_text.update(
                    ((feature, *chosen[place][:2]), run) for (feature, place), run in zip(pairs, runs, strict=True)
                )

            in_slices(pairs, passes.batch_size, run_pairs)

    in_slices(texts, passes.batch_size, run_texts)
    return by_text


def _streams(
    bridge: TransformerBridge, edit: Edit, texts: Sequence[Encoded], features: Sequence[Feature]
) -> dict[Site, list[_Stream]]:
    """By site of the features, each text under the condition."""
    sites = sorted({site for site, _ in features})
    rows = [text.ids for text in texts]
    batch = pad_left(rows, bridge.tokenizer.pad_token_id).to(device_of(bridge))
    through = sorted({site.layer for site in sites if site.layer and not starts_above(site)})
    with spliced(bridge, edit) as splice:
        splice.reset(batch.editable, torch.ones(len(rows), device=batch.ids.device), RowEdits(bos=batch.bos))
        prefixes = read_prefixes(bridge, rows, sites)
        entering: Mapping[int, Sequence[Tensor]] = read_entering(bridge, rows, through) if through else {}
    by_site = {patch.site: patch for patch in edit.patches}

    def streams_of(site: Site) -> list[_Stream]:
        starts: Sequence[Tensor | None] = [prefix.output for prefix in prefixes[site]]
        if not starts_above(site):
            starts = entering.get(site.layer, [None] * len(rows))
        acts = [activations(by_site[site], prefix.x) for prefix in prefixes[site]]
        return list(map(_Stream, acts, starts))

    return {site: streams_of(site) for site in sites}


def activations(patch: Patch, x: Tensor) -> Tensor:
    """Activations (tokens, d_new) of a patch's delta on a text, including BOS, from x (tokens, d_in)."""
    acts = patch.transcoder.encode(x)
    at_bos = None if patch.path is None else patch.transcoder.at_bos
    acts[0] = 0.0 if at_bos is None else at_bos
    return acts


def _above(
    bridge: TransformerBridge,
    patches: Sequence[Patch],
    condition: str,
    site: Site,
    pairs: Sequence[tuple[Feature, int]],
    streams: Sequence[_Stream],
    texts: Sequence[Encoded],
) -> list[_Run]:
    """A run for each pair of a feature of `site` and a text, starting from its block's output."""
    (W_dec,) = (patch.transcoder.W_dec for patch in patches if patch.site == site)
    sign = -1.0 if condition == "full" else 1.0
    rows = [texts[place] for _, place in pairs]
    batch = pad_left([row.ids for row in rows], bridge.tokenizer.pad_token_id).to(device_of(bridge))
    starts = []
    for (_, feature), place in pairs:
        acts, output = streams[place]
        assert output is not None
        moved = output.float() + sign * acts[:, feature, None].float() * W_dec[feature].float()
        starts.append(moved.to(output.dtype))
    residual = padded(starts, range(len(rows)), batch.ids.shape[1])
    above = [patch for patch in patches if patch.site > site]
    with spliced(bridge, Edit(above, condition)) if above else nullcontext() as splice:
        if splice is not None:
            splice.reset(batch.editable, torch.ones(len(rows), device=batch.ids.device), RowEdits(bos=batch.bos))
        last = resume(bridge, batch, site.layer, residual)
        return list(_answers(bridge, last, batch.ids, [len(row.target) for row in rows]))


def _through(
    bridge: TransformerBridge,
    patches: Sequence[Patch],
    condition: str,
    site: Site,
    pairs: Sequence[tuple[Feature, int]],
    streams: Sequence[_Stream],
    texts: Sequence[Encoded],
) -> list[_Run]:
    """Like `_above`, but from what enters the block of `site`, as needed for features that other parts of their own
    block read."""
    ranked = [patch for patch in numbered(patches) if patch.site.layer >= site.layer]
    (patch_of_site,) = (patch for patch in ranked if patch.site == site)
    rows = [texts[place] for _, place in pairs]
    ranks = [only(patch_of_site, feature, outside=condition == "full") for (_, feature), _ in pairs]
    jobs = [Job(row, kept=row_ranks) for row, row_ranks in zip(rows, ranks, strict=True)]
    batch = pad_left([row.ids for row in rows], bridge.tokenizer.pad_token_id).to(device_of(bridge))
    starts = [start for _, place in pairs if (start := streams[place].start) is not None]
    residual = padded(starts, range(len(rows)), batch.ids.shape[1]) if starts else None
    with spliced(bridge, Edit(ranked, "full")) as splice:
        prepare(splice, batch, jobs)
        last = resume(bridge, batch, site.layer - 1, residual)
        return list(_answers(bridge, last, batch.ids, [len(row.target) for row in rows]))


def only(patch: Patch, feature: int, outside: bool) -> Ranks:
    """Ranks for only that feature of a patch from `numbered`, or, with `outside`, for all but it."""
    assert patch.ranks is not None
    rank = int(patch.ranks[feature])
    return Ranks(rank, rank + 1, outside=outside)


def _answers(bridge: TransformerBridge, last: Tensor, ids: Tensor, counts: Sequence[int]) -> Iterator[_Run]:
    """A run for each row's last `counts` tokens, from the last block's output (row, position, d_model)."""
    length = ids.shape[1]
    columns = torch.cat([torch.arange(length - count, length) for count in counts]).to(ids.device)
    lines = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).to(ids.device)
    labels, done = ids[lines, columns], 0
    nlls, choices = [], []
    for logits in project(bridge, last[lines, columns - 1]):
        nlls.append(functional.cross_entropy(logits, labels[done : done + len(logits)], reduction="none"))
        choices.append(logits.argmax(-1))
        done += len(logits)
    by_row = zip(
        torch.cat(nlls).double().cpu().split(list(counts)), torch.cat(choices).split(list(counts)), strict=True
    )
    for nll, argmax in by_row:
        yield _Run(nll.sum().item(), argmax.tolist())


def _outputs(
    passes: Passes,
    patches: Sequence[Patch],
    way: str,
    baselines: Sequence[_Baseline],
    runs: Mapping[tuple[Feature, int, int], _Run],
    stop: Stop,
) -> dict[tuple[Feature, int], list[int]]:
    """By feature and row, the outputs that a feature changes, decoded from where they depart from the baseline's."""
    changed = []
    for (feature, place, text), run in runs.items():
        baseline = baselines[place]
        if text == len(baseline.texts) - 1 and run.argmax != baseline.output:
            changed.append((feature, place, run))
    if not changed:
        return {}
    ranked = numbered(patches)
    jobs, scored = [], []
    for (site, number), place, run in changed:
        (patch,) = (candidate for candidate in ranked if candidate.site == site)
        baseline = baselines[place]
        jobs.append(Job(baseline.texts[-1], kept=only(patch, number, outside=way == "ablated")))
        scored.append(baseline.scored._replace(argmax=run.argmax, guessed=[]))  # what decoding starts from
    outputs = generate(passes, Edit(ranked, "full"), jobs, scored, stop)
    return {(feature, place): output for (feature, place, _), output in zip(changed, outputs, strict=True)}


def numbered(patches: Sequence[Patch]) -> list[Patch]:
    """The patches with ranks that only identify features: each feature's index among those of all patches."""
    ranked = []
    for patch in patches:
        first = sum(earlier.transcoder.d_sae for earlier in patches if earlier.site < patch.site)
        ranks = torch.arange(first, first + patch.transcoder.d_sae, device=patch.transcoder.W_dec.device)
        ranked.append(replace(patch, ranks=ranks))
    return ranked

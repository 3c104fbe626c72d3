"""Features of a delta: every figure against a loop, an edit by hand, or the finite difference it stands for."""

import dataclasses
from collections import Counter

import pytest
import torch

from evaluators.measures import features
from evaluators.measures.behaviours import read_behaviours
from evaluators.measures.features import evaluate_features
from evaluators.measures.reconstruction import site_activations
from evaluators.splice.decoding import Stop, decode
from evaluators.splice.interventions import Edit, Site
from evaluators.splice.limits import Limits
from evaluators.splice.teacher_forcing import Job, score

BUDGET = 5
CALLS = read_behaviours({"tool_call": "calculator"})


@pytest.fixture(scope="module")
def found(subject):
    return evaluate_features(
        subject.passes, subject.site[0], subject.rows, ablations=4, limits=Limits(BUDGET), behaviours=CALLS
    )


def without(site, feature, scale=0.0):
    """The site with a feature's decoder row scaled."""
    W_dec = site.delta.W_dec.clone()
    W_dec[feature] *= scale
    return dataclasses.replace(site, delta=dataclasses.replace(site.delta, W_dec=W_dec))


def test_firing_rates_and_contexts_are_those_of_a_loop(subject, found):
    (site,) = subject.site
    assert [one["feature"] for one in found] == list(range(site.delta.d_sae))
    for label in ("tool", "copy"):
        rows = [row for row in subject.rows if row.label == label]
        acts = site.delta.encode(site_activations(subject.passes, site, rows)[0])
        for one in found:
            assert one["firing_rate"][label] == pytest.approx((acts[:, one["feature"]] > 0).float().mean().item())
    every = site.delta.encode(site_activations(subject.passes, site, subject.rows)[0])
    for one in found:
        strongest = every[:, one["feature"]].max().item()
        contexts = one["contexts"]
        if strongest == 0:
            assert contexts == []
            continue
        assert contexts[0]["activation"] == pytest.approx(strongest, rel=1e-4)
        assert all(context["text"].count("«") == 1 for context in contexts)
        assert [context["activation"] for context in contexts] == sorted(
            (context["activation"] for context in contexts), reverse=True
        )


def test_the_marked_token_is_the_one_that_fires(subject):
    """A feature that reads one token's input fires there and nowhere else as strongly."""
    (site,) = subject.site
    x, _ = site_activations(subject.passes, site, subject.rows[:1])
    ids = subject.encoded[0].ids
    place = 7
    W_enc = torch.zeros_like(site.delta.W_enc)
    W_enc[:, 0] = x[place - 1] / x[place - 1].norm()
    zeros = torch.zeros_like(site.delta.b_enc)
    delta = dataclasses.replace(site.delta, W_enc=W_enc, b_enc=zeros, threshold=zeros)
    first, *others = evaluate_features(
        subject.passes, Site(1, site.base, delta), subject.rows[:1], ablations=0, limits=Limits(1), behaviours=CALLS
    )
    marked = first["contexts"][0]["text"].split("«")[1].split("»")[0]
    assert marked == subject.tokenizer.decode([ids[place]])
    assert all(one["contexts"] == [] for one in others)
    assert first["ablation"] is None


def test_an_ablated_feature_is_a_feature_with_a_silent_decoder_row(subject, found):
    (site,) = subject.site
    measured = [one for one in found if one["ablation"] is not None]
    assert len(measured) == 4
    stop = Stop.of(subject.bridge, Limits(BUDGET), subject.rows[0])
    jobs = [Job(row) for row in subject.encoded]
    starts = [Job(row._replace(target=[])) for row in subject.encoded]
    full = score(subject.passes, Edit([site], "full"), jobs)
    moved = 0.0
    for one in measured:
        silent = [without(site, one["feature"])]
        expected = score(subject.passes, Edit(silent, "full"), jobs)
        outputs = decode(subject.passes, Edit(silent, "full"), starts, [[] for _ in starts], stop)
        places = Counter()
        for row, nll, base, output in zip(subject.rows, expected, full, outputs, strict=True):
            entry = one["ablation"][row.label][places[row.label]]
            places[row.label] += 1
            assert entry["nll"] == pytest.approx(nll.nll, rel=1e-4)
            assert entry["nll_full"] == pytest.approx(base.nll, rel=1e-4)
            assert entry["behaviours"] == {"tool_call": "<tool_call>" in stop.text(output)}
            moved = max(moved, abs(entry["nll"] - entry["nll_full"]))
    assert moved > 1e-3


def test_attribution_is_the_slope_of_the_ablation(subject, found):
    (site,) = subject.site
    jobs = [Job(row) for row in subject.encoded]
    tokens = sum(len(row.target) for row in subject.encoded)
    step = 0.02
    for feature in (0, 3, 7):
        up, down = (
            sum(one.nll for one in score(subject.passes, Edit([without(site, feature, scale)], "full"), jobs))
            for scale in (1 + step, 1 - step)
        )
        slope = -(up - down) / (2 * step) / tokens
        assert found[feature]["attribution"] == pytest.approx(slope, rel=0.05, abs=2e-4)


def test_the_most_attributed_features_are_ablated(found):
    kept = [abs(one["attribution"]) for one in found if one["ablation"] is not None]
    left = [abs(one["attribution"]) for one in found if one["ablation"] is None and one["contexts"]]
    assert min(kept) >= max(left, default=0.0)


def test_promoted_tokens_gain_most_along_the_decoder_direction(subject, found):
    """On a model whose last block is the site's own, a larger step along the direction moves the same tokens."""
    site = subject.site[0]
    weights = subject.plain.get_output_embeddings().weight
    assert all(len(one["promoted"]) == len(one["suppressed"]) == features.TOKENS for one in found)
    gain = subject.plain.model.norm.weight + (1 if subject.plain.config.model_type == "gemma2" else 0)
    agreed = 0
    for one in found:
        through = weights.detach() @ (site.delta.W_dec[one["feature"]] * gain.detach())
        named = {subject.tokenizer.decode([token]) for token in through.topk(3 * features.TOKENS).indices.tolist()}
        agreed += len(named & set(one["promoted"]))
    assert agreed / (len(found) * features.TOKENS) > 0.5


def test_texts_without_the_feature_are_not_run_again(subject, monkeypatch):
    (site,) = subject.site
    rows = []
    real = features.score

    def spy(passes, edit, jobs):
        rows.append(len(jobs))
        return real(passes, edit, jobs)

    monkeypatch.setattr(features, "score", spy)
    quiet = dataclasses.replace(site.delta, threshold=torch.full_like(site.delta.threshold, 1e9))
    found = evaluate_features(
        subject.passes, Site(1, site.base, quiet), subject.rows, ablations=3, limits=Limits(BUDGET), behaviours=CALLS
    )
    assert rows == []
    assert all(one["ablation"] is None and one["attribution"] == 0 for one in found)
    with pytest.raises(ValueError, match="layer 1 has no delta"):
        evaluate_features(
            subject.passes, Site(1, site.base), subject.rows, ablations=1, limits=Limits(1), behaviours=CALLS
        )

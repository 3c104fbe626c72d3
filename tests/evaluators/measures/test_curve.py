"""Few features: the estimate is the slope of a feature's gate, and each k is those features alone."""

import dataclasses

import pytest
import torch

from evaluators.measures import curve
from evaluators.measures.curve import Ranked, counts, evaluate_curve, rank_features
from evaluators.splice.interventions import Edit
from evaluators.splice.teacher_forcing import Job, Reference, score


@pytest.fixture(scope="module")
def ranked(subject):
    return rank_features(subject.passes, subject.patches, subject.rows)


def with_gate(patch, feature, gate):
    W_dec = patch.delta.W_dec.clone()
    W_dec[feature] *= gate
    return dataclasses.replace(patch, delta=dataclasses.replace(patch.delta, W_dec=W_dec))


def test_every_feature_has_its_place(subject, ranked):
    assert {(one.site, one.feature) for one in ranked} == {
        (patch.site, feature) for patch in subject.patches for feature in range(patch.delta.d_sae)
    }
    assert [one.effect for one in ranked] == sorted((one.effect for one in ranked), reverse=True)


def test_an_effect_is_the_slope_of_the_features_gate_averaged_over_strengths(subject):
    """Central differences of the summed CE in a gate, at each strength, over the path's derivative. At one site: what a
    gate does to the thresholds of sites above is a jump, which no gradient sees."""
    (patch,) = subject.patch
    ranked = rank_features(subject.passes, [patch], subject.rows)
    tokens = sum(len(row.target) for row in subject.encoded)
    step = 0.02
    for one in (ranked[0], ranked[-1], ranked[len(ranked) // 2]):
        expected = 0.0
        for alpha in curve.STRENGTHS:
            jobs = [Job(row, alpha) for row in subject.encoded]
            up, down = (
                sum(
                    row.nll for row in score(subject.passes, Edit([with_gate(patch, one.feature, gate)], "alpha"), jobs)
                )
                for gate in (1 + step, 1 - step)
            )
            expected -= (up - down) / (2 * step) / alpha / len(curve.STRENGTHS) / tokens
        assert one.effect == pytest.approx(expected, rel=0.05, abs=2e-4)


def test_each_count_is_the_first_features_alone(subject, ranked):
    found = evaluate_curve(subject.passes, subject.patches, subject.rows, ranked, Reference(subject.bridge))
    assert list(found) == counts(len(ranked)) == [0, 1, 2, 4, 8, 16, 24]
    jobs = [Job(row) for row in subject.encoded]
    for count in (0, 4, len(ranked)):
        kept = {(one.site, one.feature) for one in ranked[:count]}
        patches = []
        for patch in subject.patches:
            gate = torch.tensor([float((patch.site, feature) in kept) for feature in range(patch.delta.d_sae)])
            delta = dataclasses.replace(patch.delta, W_dec=patch.delta.W_dec * gate.unsqueeze(1))
            patches.append(dataclasses.replace(patch, delta=delta))
        expected = score(subject.passes, Edit(patches, "full"), jobs)
        assert [row["nll"] for row in found[count]] == pytest.approx([one.nll for one in expected], rel=1e-5)
        assert [row["n_tokens"] for row in found[count]] == [one.n_tokens for one in expected]


def test_the_ends_are_the_conditions_no_delta_and_full(subject, path_sites, monkeypatch):
    """Also where deltas have features at BOS, which are ranked like all others."""
    ranked = rank_features(subject.passes, path_sites, subject.rows)
    reference = Reference(subject.bridge)
    plain = evaluate_curve(subject.passes, path_sites, subject.rows, ranked, reference)
    known = {}
    for condition in ("no_delta", "full"):
        scored = score(subject.passes, Edit(path_sites, condition), [*map(Job, subject.encoded)], reference=reference)
        known[condition] = [
            {"index": index, "nll": one.nll, "kl": one.kl, "n_tokens": one.n_tokens, "behaviours": {}}
            for index, one in enumerate(scored)
        ]
    measured, real = [], curve.score

    def counted(passes, edit, jobs, **settings):
        measured.extend(job.kept.end for job in jobs)
        return real(passes, edit, jobs, **settings)

    monkeypatch.setattr(curve, "score", counted)
    found = evaluate_curve(subject.passes, path_sites, subject.rows, ranked, reference, known)
    assert set(measured) == set(counts(len(ranked))) - {0, len(ranked)}
    assert list(found) == list(plain)
    for count, rows in plain.items():
        for one, expected in zip(found[count], rows, strict=True):
            assert one == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_counts_are_powers_of_two_and_all():
    assert counts(1) == [0, 1]
    assert counts(5) == [0, 1, 2, 4, 5]
    assert counts(8) == [0, 1, 2, 4, 8]
    assert counts(3840) == [0, 1, 4, 16, 64, 256, 512, 1024, 2048, 3840]


def test_a_site_without_a_delta_is_named(subject):
    bare = dataclasses.replace(subject.patch[0], delta=None)
    with pytest.raises(ValueError, match="layer 1 has no delta"):
        rank_features(subject.passes, [bare], subject.rows)
    with pytest.raises(ValueError, match="layer 1 has no delta"):
        evaluate_curve(subject.passes, [bare], subject.rows, [Ranked(1, 0, 0.0)], Reference(subject.bridge))

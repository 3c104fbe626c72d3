"""What one feature does alone: the shared pass against a whole pass of each feature, and against weights by hand."""

import dataclasses

import pytest
import torch

from data.encoding import Encoded
from evaluators.measures import single_features as measured
from evaluators.measures.behaviours import read_behaviours
from evaluators.measures.single_features import WAYS, single_features
from evaluators.splice.decoding import Stop, decode
from evaluators.splice.interventions import Edit
from evaluators.splice.limits import Limits
from evaluators.splice.teacher_forcing import Job, score
from sites import Site

BUDGET = 5
BEHAVIOURS = read_behaviours(
    {"tool_call": "calculator", "brief": {"at_most_tokens": 3}, "starts": {"starts_with": "a"}}
)


@pytest.fixture(params=["paths", "bases"])
def patches(request, subject, path_sites):
    return path_sites if request.param == "paths" else subject.patches


def by_hand(patches, site, feature, way):
    """The patches with every decoder row silent but the feature's, or with that one silent alone."""
    edited = []
    for patch in patches:
        on = torch.full((patch.delta.d_sae, 1), 1.0 if way == "ablated" else 0.0)
        if patch.site == site:
            on[feature] = 1.0 - on[feature]
        edited.append(dataclasses.replace(patch, delta=dataclasses.replace(patch.delta, W_dec=patch.delta.W_dec * on)))
    return edited


def test_every_figure_is_that_of_a_silent_decoder_row(subject, patches):
    """The last of the features of a path may be the one at BOS."""
    features = [(patch.site, feature) for patch in patches for feature in (0, 5, patch.delta.d_sae - 1)]
    found = single_features(
        subject.passes, patches, subject.rows, features, limits=Limits(BUDGET), behaviours=BEHAVIOURS
    )
    stop = Stop.of(subject.bridge, Limits(BUDGET), subject.rows[0])
    judge = measured.Judge(stop, BEHAVIOURS)
    jobs = [Job(row) for row in subject.encoded]
    starts = [Job(Encoded(row.prompt, [])) for row in subject.encoded]
    moved = 0.0
    for (site, feature), ways in found.items():
        for way, condition in WAYS.items():
            edit = Edit(by_hand(patches, site, feature, way), "full")
            expected = score(subject.passes, edit, jobs)
            outputs = decode(subject.passes, edit, starts, [[] for _ in starts], stop)
            whole = score(subject.passes, Edit(patches, condition), jobs)
            for row, entry, one, output, every in zip(subject.rows, ways[way], expected, outputs, whole, strict=True):
                assert entry["subset"] == row.label
                assert entry["nll"] == pytest.approx(one.nll, rel=1e-4)
                assert entry["nll_whole"] == pytest.approx(every.nll, rel=1e-5)
                assert entry["behaviours"] == judge(row, output)
                moved = max(moved, abs(entry["nll"] - entry["nll_whole"]))
    assert moved > 1e-3


def test_texts_on_which_a_feature_is_silent_are_not_run_again(subject, monkeypatch):
    patch = subject.patch[0]
    quiet = dataclasses.replace(
        patch, delta=dataclasses.replace(patch.delta, threshold=torch.full_like(patch.delta.threshold, 1e9))
    )

    def never(*arguments):
        raise AssertionError("a pass for a silent feature")

    monkeypatch.setattr(measured, "_above", never)
    found = single_features(
        subject.passes, [quiet], subject.rows, [(Site(1), 3)], limits=Limits(BUDGET), behaviours=BEHAVIOURS
    )
    for way in WAYS:
        for entry in found[Site(1), 3][way]:
            assert entry["nll"] == entry["nll_whole"]
            assert entry["behaviours"] == entry["behaviours_whole"]


def test_guesses_change_nothing(subject, path_sites):
    features = [(path_sites[0].site, 2)]
    asked = {"limits": Limits(BUDGET), "behaviours": BEHAVIOURS}
    plain = single_features(subject.passes, path_sites, subject.rows, features, **asked)
    guesses = {"full": [row.target for row in subject.encoded], "no_delta": [[1, 2, 3]] * len(subject.rows)}
    assert single_features(subject.passes, path_sites, subject.rows, features, guesses=guesses, **asked) == plain


@pytest.mark.parametrize("feature", [(Site(1), 99), (Site(7), 0), (Site(1), -1)])
def test_a_feature_that_is_not_there(subject, feature):
    with pytest.raises(ValueError, match=f"no delta has a feature {feature[1]} in layer {feature[0].label}"):
        single_features(subject.passes, subject.patch, subject.rows, [feature], limits=Limits(1), behaviours={})

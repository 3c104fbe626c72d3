"""Groups: planted ones are found, the figures are those of scipy and scikit-learn, and every feature has one place."""

import dataclasses

import numpy as np
import pytest
import torch
from scipy.spatial.distance import pdist
from sklearn.metrics import silhouette_score

from evaluators.measures import groups
from evaluators.measures.groups import SINGLE, cluster, find_groups, silhouette, unit
from evaluators.splice.interventions import Patch
from models.blocks import read_paths
from models.transcoder import with_bos
from sites import mlp_sites

SIZES = (12, 9, 20)
N_SINGLE = 6


@pytest.fixture(scope="module")
def planted():
    """(feature, token) activations, noisy copies of a pattern per group, and some features that resemble nothing."""
    generator = np.random.default_rng(0)
    patterns = generator.random((len(SIZES), 200)) * (generator.random((len(SIZES), 200)) < 0.15)
    acts = [
        patterns[number] * generator.uniform(0.5, 20) * generator.uniform(0.6, 1.4, 200)
        for number, size in enumerate(SIZES)
        for _ in range(size)
    ]
    acts += [generator.random(200) * (generator.random(200) < 0.05) for _ in range(N_SINGLE)]
    labels = [number for number, size in enumerate(SIZES) for _ in range(size)] + [SINGLE] * N_SINGLE
    return np.array(acts, dtype=np.float32), np.array(labels)


def test_planted_groups_are_found_and_the_rest_stays_single(planted):
    acts, labels = planted
    found = cluster(unit(acts)).labels
    assert (found == SINGLE).tolist() == (labels == SINGLE).tolist()
    for number in range(len(SIZES)):
        assert len(set(found[labels == number])) == 1
    assert len(set(found) - {SINGLE}) == len(SIZES)


def test_distances_and_the_silhouette_are_those_of_the_libraries(planted):
    acts, labels = planted
    assert groups._distances(unit(acts)) == pytest.approx(pdist(acts, "cosine"), abs=1e-5)
    grouped = labels != SINGLE
    expected = silhouette_score(acts[grouped], labels[grouped], metric="cosine")
    assert silhouette(unit(acts[grouped]), labels[grouped]) == pytest.approx(expected, abs=1e-5)
    # Single features count as 0.
    assert silhouette(unit(acts), labels) == pytest.approx(expected * grouped.mean(), abs=1e-5)


def test_a_feature_that_is_silent_on_the_other_half_counts_as_nothing(planted):
    acts, labels = planted
    silent = acts.copy()
    silent[:5] = 0
    here, without = silhouette(unit(silent), labels), silhouette(unit(acts), labels)
    assert 0 < here < without


def test_few_features_or_one_cluster_make_no_groups(planted):
    acts, _ = planted
    assert set(cluster(unit(acts[:10])).labels) == {SINGLE}
    assert set(cluster(unit(acts[:12])).labels) == {SINGLE}
    assert silhouette(unit(acts[:12]), np.zeros(12, dtype=np.int64)) == 0.0


def test_only_the_largest_groups_are_kept(planted, monkeypatch):
    acts, labels = planted
    monkeypatch.setattr(groups, "MOST_GROUPS", 2)
    found = cluster(unit(acts)).labels
    assert (found[labels == 1] == SINGLE).all(), "the smallest is left out"
    assert len(set(found) - {SINGLE}) == 2


@pytest.fixture(scope="module")
def patches(subject, base_folder, random_transcoder):
    """Two sites whose deltas hold two directions eight times each, at other scales, and a feature at BOS."""
    paths = read_paths(subject.bridge, base_folder, mlp_sites((0, 2)))
    found = []
    for site, path in paths.items():
        two = random_transcoder(subject.d_model, 2, site.layer, seed=70 + site.layer, bias=False)
        times = torch.linspace(0.5, 2, 8).repeat(2)
        repeated = dataclasses.replace(
            two,
            W_enc=two.W_enc.repeat_interleave(8, 1) * times,
            b_enc=two.b_enc.repeat_interleave(8) * times,
            threshold=two.threshold.repeat_interleave(8) * times,
            W_dec=torch.randn(16, subject.d_model, generator=torch.Generator().manual_seed(site.layer)),
        )
        delta = with_bos(repeated, torch.randn(subject.d_model, generator=torch.Generator().manual_seed(1)))
        found.append(Patch(site, path, delta))
    return found


@pytest.fixture(scope="module")
def rows(subject):
    """Enough texts for both halves."""
    return [*subject.rows, *(dataclasses.replace(row, input=f"{row.input} Again.") for row in subject.rows)]


@pytest.fixture(scope="module")
def found(subject, patches, rows):
    effects = {(patch.site, number): float(number) for patch in patches for number in range(17)}
    return find_groups(subject.passes, patches, rows, effects)


def test_features_that_fire_on_the_same_tokens_are_a_group(patches, found):
    listed = [set(group["features"]) for group in found["groups"]]
    halves = [{(patch.site, number) for number in range(first, first + 8)} for patch in patches for first in (0, 8)]
    for half in halves:
        if not half & set(found["singles"]) and any(half & group for group in listed):
            assert any(half <= group for group in listed), "copies of one direction are never apart"
    assert sum(any(half & group for group in listed) for half in halves) >= 2
    every = [feature for group in found["groups"] for feature in group["features"]] + found["singles"]
    assert len(every) == len(set(every)) == found["n_live"]
    assert not any(number == 16 for _, number in every), "the feature at BOS belongs to no group"


def test_groups_and_their_features_are_in_order_of_effect(found):
    effects = [group["effect"] for group in found["groups"]]
    assert effects == sorted(effects, reverse=True)
    for group in found["groups"]:
        numbers = [number for _, number in group["features"]]
        assert group["effect"] == sum(numbers)
        assert numbers == sorted(numbers, reverse=True)


def test_a_group_says_what_it_fires_on(subject, found):
    for group in found["groups"]:
        shares = [share for _, share in group["fires_on"]]
        assert shares == sorted(shares, reverse=True)
        assert 0 < sum(shares) <= 1.001
        assert group["contexts"], "where it fires most"
        first = group["contexts"][0]
        assert max(first["acts"]) == first["acts"][first["peak"]] == pytest.approx(1.0, abs=1e-3)
        assert len(group["promoted"]) == len(group["suppressed"]) == 8


def test_features_outside_the_tree_join_the_group_they_resemble(subject, patches, rows, found, monkeypatch):
    monkeypatch.setattr(groups, "MOST_CLUSTERED", 30)
    monkeypatch.setattr(groups, "FEWEST_FEATURES", 6)
    capped = find_groups(subject.passes, patches, rows, {})
    assert capped["n_clustered"] == min(30, found["n_live"])
    assert capped["n_live"] == found["n_live"]
    assert {frozenset(group["features"]) for group in capped["groups"]} == {
        frozenset(group["features"]) for group in found["groups"]
    }

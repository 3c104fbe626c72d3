"""Deltas on the un-finetuned MLPs: every figure and token against a plain model with plain hooks."""

import dataclasses

import pytest
import torch

from evaluators.measures.checks import change_checks, exactness_checks
from evaluators.measures.curve import STRENGTHS, rank_features
from evaluators.measures.reconstruction import site_activations
from evaluators.splice.decoding import Stop, decode, generate
from evaluators.splice.interventions import Edit, Patch, Ranks
from evaluators.splice.limits import Limits
from evaluators.splice.passes import Passes, Prefixes, Shortcuts
from evaluators.splice.second_moments import Moments, principal_directions
from evaluators.splice.substitutes import SUBSTITUTES, Material, TrueChange, pca_delta
from evaluators.splice.teacher_forcing import Job, score
from models.blocks import read_paths
from tests.evaluators.conftest import ByHand

BUDGET = 6


@pytest.fixture(scope="module")
def patches(path_sites):
    return path_sites


class Plain(ByHand):
    """The finetuned model with un-finetuned blocks' parts at the patches and the delta added, by hand."""

    def edited(self, patch, x, y, sums):
        delta = patch.delta.encode(x) @ patch.delta.W_dec
        bos = patch.delta.W_dec[12] if len(patch.delta.W_dec) > 12 else torch.zeros_like(x[0])
        return y + self.alpha * torch.cat([bos.unsqueeze(0), delta])


@pytest.fixture(scope="module")
def plain(subject, base_folder, patches, grafted):
    return Plain(grafted(subject.folder, base_folder, [patch.site.layer for patch in patches]), patches, "alpha")


@pytest.mark.parametrize(
    "shortcuts",
    [Shortcuts(), dataclasses.replace(Shortcuts(), start_above=False), Shortcuts.none()],
    ids=["shortcuts", "entering the first block", "none"],
)
def test_scores_and_tokens_are_those_of_a_plain_model(subject, patches, plain, shortcuts):
    passes, stop = Passes(subject.bridge, 3, shortcuts), Stop.of(subject.bridge, Limits(BUDGET), subject.rows[0])
    for alpha in (0.0, 0.7, 1.0, -0.5):
        plain.alpha = alpha
        expected = [plain.greedy(row.prompt, {subject.tokenizer.eos_token_id}, BUDGET) for row in subject.encoded]
        jobs = [Job(row, alpha, guess=output) for row, output in zip(subject.encoded, expected, strict=True)]
        edit = Edit(patches, "alpha")
        scored = score(passes, edit, jobs)
        assert [one.nll for one in scored] == pytest.approx([plain.nll(row)[0] for row in subject.encoded], rel=1e-4)
        assert generate(passes, edit, jobs, scored, stop) == expected
        assert all(one.base_acts == 0 for one in scored)


def test_strengths_share_a_batch_and_zero_and_one_have_names(subject, patches):
    jobs = [Job(row, alpha) for alpha in (0.0, 0.5, 1.0) for row in subject.encoded]
    found = [one.nll for one in score(subject.passes, Edit(patches, "alpha"), jobs)]
    count = len(subject.encoded)
    plain_jobs = [Job(row) for row in subject.encoded]
    for place, condition in ((0, "no_delta"), (2, "full")):
        alone = [one.nll for one in score(subject.passes, Edit(patches, condition), plain_jobs)]
        assert found[place * count : (place + 1) * count] == pytest.approx(alone, rel=1e-6)


def test_the_model_is_raw_again_afterwards(subject, patches):
    jobs = [Job(row) for row in subject.encoded]
    before = score(subject.passes, Edit(), jobs)
    score(subject.passes, Edit(patches, "full"), jobs)
    with pytest.raises(ZeroDivisionError):
        decode(
            subject.passes,
            Edit(patches, "full"),
            jobs,
            [[] for _ in jobs],
            Broken(subject.tokenizer, Limits(3), frozenset()),
        )
    assert score(subject.passes, Edit(), jobs) == before


class Broken(Stop):
    def cut(self, tokens):
        raise ZeroDivisionError


def test_only_the_first_features_are_kept(subject, patches):
    sizes = [patch.delta.d_sae for patch in patches]
    ranks = torch.randperm(sum(sizes), generator=torch.Generator().manual_seed(1)).split(sizes)
    marked = [dataclasses.replace(patch, ranks=one) for patch, one in zip(patches, ranks, strict=True)]
    counts = (0, 1, 5, sum(sizes))
    jobs = [Job(row, kept=Ranks(0, count)) for count in counts for row in subject.encoded]
    found = [one.nll for one in score(subject.passes, Edit(marked, "full"), jobs)]
    no_delta = [
        one.nll for one in score(subject.passes, Edit(patches, "no_delta"), [Job(row) for row in subject.encoded])
    ]
    full = [one.nll for one in score(subject.passes, Edit(patches, "full"), [Job(row) for row in subject.encoded])]
    size = len(subject.encoded)
    assert found[:size] == pytest.approx(no_delta, rel=1e-5)
    assert found[-size:] == pytest.approx(full, rel=1e-5)
    silenced = [
        dataclasses.replace(
            patch, delta=dataclasses.replace(patch.delta, W_dec=patch.delta.W_dec * (one < 5).unsqueeze(1))
        )
        for patch, one in zip(patches, ranks, strict=True)
    ]
    five = [one.nll for one in score(subject.passes, Edit(silenced, "full"), [Job(row) for row in subject.encoded])]
    assert found[2 * size : 3 * size] == pytest.approx(five, rel=1e-5)


def test_the_checks_of_every_sweep_hold_here_and_name_a_wrong_ground(subject, patches, base_folder):
    sites = [patch.site for patch in patches]
    before, after = (read_paths(subject.bridge, folder, sites) for folder in (base_folder, subject.folder))
    checks = change_checks(subject.bridge, subject.rows, patches, before, after)
    checks += exactness_checks(subject.bridge, subject.rows, patches, Limits(4))
    assert [check["name"] for check in checks if not check["passed"]] == []
    wrong = change_checks(subject.bridge, subject.rows, patches, after, after)
    assert sum("true change" in check["name"] for check in wrong if not check["passed"]) == 2


@pytest.mark.parametrize("control", ["shuffled_delta", "dense_delta", "random_delta", "pca_delta"])
def test_controls_keep_a_feature_at_bos(subject, patches, base_folder, control):
    """As it is, but for the random one, which turns its direction and keeps its size; however it is computed."""
    sites = [patch.site for patch in patches]
    raw = Passes(subject.bridge, prefixes=Prefixes(subject.bridge, sites))
    before, after = (read_paths(subject.bridge, folder, sites) for folder in (base_folder, subject.folder))
    made = []
    for patch in patches:
        x = site_activations(raw, patch, subject.rows)[0]
        change = TrueChange(before[patch.site], after[patch.site])
        material = Material(
            lambda x=x: x, lambda x=x, patch=patch: Moments.of([(x, patch.delta(x))]), 3, lambda change=change: change
        )
        other = SUBSTITUTES[control](patch, material)
        made.append(other)
        if patch.delta.at_bos is not None:
            ours, theirs = (one.delta.at_bos @ one.delta.W_dec for one in (patch, other))
            if control == "random_delta":
                assert theirs.norm().item() == pytest.approx(ours.norm().item(), rel=0.5)
                assert torch.cosine_similarity(ours, theirs, dim=0).abs() < 0.9
            else:
                torch.testing.assert_close(ours, theirs)
    jobs = [Job(row, first=20 * place) for place, row in enumerate(subject.encoded)]
    found = [
        [one.nll for one in score(Passes(subject.bridge, 3, shortcuts), Edit(made, control), jobs)]
        for shortcuts in (Shortcuts(), Shortcuts.none())
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_principal_directions_are_those_of_the_covariance_largest_last():
    generator = torch.Generator().manual_seed(0)
    axes = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    sizes, shift = torch.tensor([0.01, 0.1, 5, 0.2, 3, 0.02]), torch.arange(6.0)
    rows = torch.randn(4000, 6, generator=generator) * sizes @ axes + shift
    mean, directions = principal_directions(Moments.of((one, one) for one in rows.split(999)), 2)
    torch.testing.assert_close(mean.float(), rows.mean(0), rtol=1e-4, atol=1e-4)
    assert (directions[1].float() @ axes[2]).abs() > 0.999
    assert (directions[0].float() @ axes[4]).abs() > 0.999
    torch.testing.assert_close(directions @ directions.T, torch.eye(2, dtype=torch.float64))
    assert len(principal_directions(Moments.of([(rows, rows)]), 9)[1]) == 6


def test_a_pca_delta_is_the_true_change_along_its_directions(subject, patches, base_folder):
    """With as many directions as dimensions it is all of the change; with d_new, the change's projection on them."""
    sites = [patch.site for patch in patches]
    before, after = (read_paths(subject.bridge, folder, sites) for folder in (base_folder, subject.folder))
    raw = Passes(subject.bridge, prefixes=Prefixes(subject.bridge, sites))
    made, whole, true = [], [], []
    for patch in patches:
        change = TrueChange(before[patch.site], after[patch.site])
        x = site_activations(raw, patch, subject.rows)[0]
        c = change.decode(x)
        moments = Moments.of([(x, c)])
        material = Material(lambda x=x: x, lambda moments=moments: moments, 3, lambda change=change: change)
        made.append(pca_delta(patch, material))
        mean, directions = principal_directions(moments, 12)
        expected = mean.float() + (c - mean.float()) @ directions.float().T @ directions.float()
        torch.testing.assert_close(made[-1].delta.decode(made[-1].delta.encode(x)), expected, rtol=1e-3, atol=1e-3)
        rows = torch.cat([principal_directions(moments, patch.delta.d_out)[1].float(), made[-1].delta.W_dec[-2:]])
        whole.append(dataclasses.replace(patch, delta=dataclasses.replace(made[-1].delta, W_dec=rows)))
        true.append(Patch(patch.site, patch.ground, change))
        with pytest.raises(ValueError, match="not known here"):
            pca_delta(patch, material._replace(change=None))

    def nlls(spliced, condition="full"):
        jobs = [Job(row, alpha=1.0) for row in subject.encoded]
        return [one.nll for one in score(Passes(subject.bridge, 3), Edit(spliced, condition), jobs)]

    if all(patch.delta.at_bos is None for patch in patches):
        assert nlls(whole) == pytest.approx(nlls(true), rel=1e-3)
    assert nlls(made, "pca_delta") != pytest.approx(nlls(whole), rel=1e-3)


def test_what_a_feature_at_bos_does_is_ranked_with_the_others(subject, patches):
    """Its estimated effect is the slope of its gate, by central differences at each strength."""
    patch = patches[-1]
    ranked = {one.feature: one.effect for one in rank_features(subject.passes, [patch], subject.rows)}
    if patch.delta.at_bos is None:
        assert sorted(ranked) == list(range(12))
        return
    tokens, step, expected = sum(len(row.target) for row in subject.encoded), 0.02, 0.0
    for alpha in STRENGTHS:
        nlls = []
        for gate in (1 + step, 1 - step):
            W_dec = torch.where(patch.delta.at_bos.unsqueeze(1) > 0, gate * patch.delta.W_dec, patch.delta.W_dec)
            gated = dataclasses.replace(patch, delta=dataclasses.replace(patch.delta, W_dec=W_dec))
            jobs = [Job(row, alpha) for row in subject.encoded]
            nlls.append(sum(one.nll for one in score(subject.passes, Edit([gated], "alpha"), jobs)))
        expected -= (nlls[0] - nlls[1]) / (2 * step) / alpha / len(STRENGTHS) / tokens
    assert ranked[12] == pytest.approx(expected, rel=0.05, abs=2e-4)

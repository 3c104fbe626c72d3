"""The controls: what replaces a delta is what it says, and every control can be evaluated like any condition."""

import shutil
from dataclasses import replace
from typing import get_args

import pytest
import torch

from evaluators.conditions import CONDITIONS, CONTROLS
from evaluators.measures.edited_behaviour import Ask, evaluate_behaviour
from evaluators.measures.reconstruction import site_activations
from evaluators.splice.decoding import Stop, decode
from evaluators.splice.interventions import Edit, Patch, spliced
from evaluators.splice.limits import Limits
from evaluators.splice.passes import Passes, Shortcuts
from evaluators.splice.second_moments import Moments, reduced_rank_regression
from evaluators.splice.substitutes import SUBSTITUTES, Material, dense_delta, random_delta, shuffled_delta
from evaluators.splice.teacher_forcing import Job, score
from models.blocks import exchanged, read_paths
from models.errors import ModelError
from models.weights import open_weights
from search_spaces.schema import Evaluate
from sites import ATTENTION_OUT, Site, mlp_sites


def no_moments():
    raise AssertionError("this control is not fitted to pairs")


@pytest.fixture(scope="module")
def material(subject):
    def make(patch, moments=no_moments, seed=3):
        return Material(lambda: site_activations(subject.passes, patch, subject.rows)[0], moments, seed)

    return make


def run(subject, patches, condition, shortcuts=Shortcuts(), batch_size=3):  # noqa: B008
    passes = Passes(subject.bridge, batch_size, shortcuts)
    ((_, figures, texts),) = evaluate_behaviour(
        passes, patches, subject.rows, [Ask(condition)], limits=Limits(5), behaviours={}
    )
    return [one["nll"] for one in figures], [one["tokens"] for one in texts]


def test_the_settings_allow_every_control_there_is():
    (names, *_) = get_args(Evaluate.model_fields["controls"].annotation)
    assert get_args(names) == CONTROLS
    assert set(CONTROLS) <= set(CONDITIONS)
    assert set(SUBSTITUTES) == {name for name, one in CONDITIONS.items() if one.substitute}


def test_a_random_delta_keeps_features_and_size_and_turns_their_directions(subject, material):
    (patch,) = subject.patch
    made = material(patch)
    other = random_delta(patch, made)
    assert torch.equal(other.delta.encode(made.x()), patch.delta.encode(made.x()))
    assert other.delta(made.x()).norm().item() == pytest.approx(patch.delta(made.x()).norm().item(), rel=1e-5)
    cosines = torch.cosine_similarity(other.delta.W_dec, patch.delta.W_dec, dim=1)
    assert cosines.abs().max() < 0.9
    assert torch.equal(random_delta(patch, made).delta.W_dec, other.delta.W_dec)
    assert not torch.equal(random_delta(patch, made._replace(seed=4)).delta.W_dec, other.delta.W_dec)


def test_random_directions_of_two_sites_do_not_add_up(subject, material):
    """Both write into one residual stream, where equal directions would pile up from layer to layer."""
    (patch,) = subject.patch
    made = material(patch)
    here = random_delta(patch, made).delta.W_dec
    for site in (Site(patch.site.layer + 1), Site(patch.site.layer, ATTENTION_OUT)):
        moved = Patch(site, replace(patch.base, site=site), replace(patch.transcoder, site=site))
        there = random_delta(moved, made).delta.W_dec
        assert torch.cosine_similarity(here, there, dim=1).abs().mean() < 0.5


def test_a_shuffled_delta_gives_each_token_the_output_of_another(subject, material):
    (patch,) = subject.patch
    made = material(patch)
    pool = shuffled_delta(patch, made).pool
    outputs = patch.delta(made.x())
    assert not torch.equal(pool, outputs)
    torch.testing.assert_close(pool.sort(dim=0).values, outputs.sort(dim=0).values, rtol=0, atol=0)


@pytest.mark.parametrize("place", ["patch", "patches"])
def test_a_shuffled_delta_is_the_same_however_it_is_computed(subject, material, place):
    patches = [shuffled_delta(patch, material(patch)) for patch in getattr(subject, place)]
    nlls, tokens = run(subject, patches, "shuffled_delta")
    for shortcuts, batch_size in ((Shortcuts.none(), 4), (Shortcuts(), 1)):
        other, written = run(subject, patches, "shuffled_delta", shortcuts, batch_size)
        assert other == pytest.approx(nlls, rel=1e-4)
        assert written == tokens
    assert run(subject, getattr(subject, place), "full")[0] != pytest.approx(nlls, rel=1e-3)
    starts = [Job(job.encoded._replace(target=[]), 1.0, job.first) for job in placed(subject)]
    stop = Stop.of(subject.bridge, Limits(5), subject.rows[0])
    begun = [[] for _ in starts]
    for use_cache in (True, False):
        assert (
            decode(subject.passes, Edit(patches, "shuffled_delta"), starts, begun, stop, use_cache=use_cache) == tokens
        )


def placed(subject):
    first, found = 0, []
    for row in subject.encoded:
        found.append(Job(row, 1.0, first))
        first += len(row.ids) - 1
    return found


def test_a_dense_delta_is_the_linear_map_of_its_rank_that_fits_best(subject, material):
    (patch,) = subject.patch
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, subject.d_model, generator=generator)
    true = torch.randn(subject.d_model, 3, generator=generator) @ torch.randn(3, subject.d_model, generator=generator)
    moments = Moments.of([(x[:200], x[:200] @ true), (x[200:], x[200:] @ true)])
    other = dense_delta(patch, material(patch, lambda: moments))
    torch.testing.assert_close(other.delta(x), x @ true, rtol=1e-3, atol=1e-2)
    assert torch.linalg.matrix_rank(other.delta(torch.eye(subject.d_model)), tol=1e-3) == 3
    assert run(subject, [other], "dense_delta")[0] != pytest.approx(run(subject, [patch], "full")[0], rel=1e-3)


def test_reduced_rank_regression_beats_other_maps_of_its_rank():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(400, 6, generator=generator) @ torch.diag(torch.tensor([9.0, 3, 1, 1, 0.3, 0.1]))
    y = x @ torch.randn(6, 5, generator=generator) + torch.randn(400, 5, generator=generator)
    encoder, decoder = reduced_rank_regression(Moments.of([(x[:100], y[:100]), (x[100:], y[100:])]), 2)
    assert encoder.shape == (6, 2)
    assert decoder.shape == (2, 5)
    best = (x.double() @ encoder @ decoder - y).square().sum()
    for _ in range(20):
        nudged = encoder + 0.01 * torch.randn(6, 2, generator=generator)
        assert (x.double() @ nudged @ decoder - y).square().sum() > best
    full = torch.linalg.lstsq(x, y).solution
    u, s, v = torch.linalg.svd(full)
    truncated = u[:, :2] @ torch.diag(s[:2]) @ v[:2]
    assert (x @ truncated - y).square().sum() > best, "truncating the full map is not optimal for these inputs"
    with pytest.raises(ValueError, match="at least one pair"):
        Moments.of([])


def test_swapped_mlps_are_those_of_the_other_model_and_go_back(subject, by_hand, altered, grafted, tmp_path):
    altered(subject.folder, tmp_path, "")
    jobs = [Job(row) for row in subject.encoded]
    before = score(subject.passes, Edit(subject.patch, "mlp_swap"), jobs)
    assert [one.nll for one in before] == pytest.approx(
        [one.nll for one in score(subject.passes, Edit((), "raw"), jobs)]
    )
    with exchanged(subject.bridge, list(read_paths(subject.bridge, tmp_path, mlp_sites([1])).values())):
        swapped = score(subject.passes, Edit(subject.patch, "mlp_swap"), jobs)
    expected = by_hand(grafted(subject.folder, tmp_path, [1]), (), "raw")
    assert [one.nll for one in swapped] == pytest.approx([expected.nll(row)[0] for row in subject.encoded], rel=1e-4)
    assert score(subject.passes, Edit(subject.patch, "mlp_swap"), jobs) == before


def test_weights_that_are_not_there_are_named(subject, tmp_path):
    shutil.copy(subject.folder / "config.json", tmp_path)
    with pytest.raises(ModelError, match=r"needs weights as model\.safetensors; it has none"):
        read_paths(subject.bridge, tmp_path, mlp_sites([1]))
    with pytest.raises(ModelError, match=r"lack nothing\.weight"):
        open_weights(subject.folder).read(["nothing.weight"])


def test_a_control_without_what_it_needs_is_refused(subject):
    with (
        pytest.raises(ValueError, match="needs a pool of outputs, and layer 1 has none"),
        spliced(subject.bridge, Edit(subject.patch, "shuffled_delta")),
    ):
        pass
    with pytest.raises(ValueError, match="layer 1 has no delta transcoder"):
        random_delta(Patch(Site(1), subject.patch[0].base), Material(lambda: torch.zeros(1, 1), no_moments, 0))

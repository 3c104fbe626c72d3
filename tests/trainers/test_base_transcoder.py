"""Base transcoders: the L0 asked for, a better fit with more features active, the same weights for a seed."""

import math
from dataclasses import replace

import pytest
import torch

from models.transcoder import Transcoder
from sites import MLP, Site
from trainers import stacked_bases
from trainers.activations import Pairs
from trainers.base_transcoder import (
    BaseSettings,
    calibrated_cut,
    output_scale,
    reconstruction_figures,
    train_bases,
)
from trainers.errors import DivergedError
from trainers.stacked_bases import StackedBases, batch_cut
from trainers.stacked_optimiser import clip_each

D_MODEL, WIDTH = 12, 64
OTHER, D_OUT = replace(MLP, reads="a", writes=("b",)), 20
TARGETS = [2.0, 6.0]
SETTINGS = BaseSettings(TARGETS, width=WIDTH, epochs=6, batch_size=128, lr=5e-3, seed=3)


def sparse_pairs(tokens: int, seed: int, shards: int = 3) -> Pairs:
    """x of unit rms, y a ReLU network of it on an offset, scaled as no layer's output is: bf16, as captures are."""
    weights = torch.Generator().manual_seed(0)
    inner, outer = torch.randn(D_MODEL, 20, generator=weights), torch.randn(20, D_MODEL, generator=weights)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D_MODEL, generator=generator)
    x = x / x.pow(2).mean(1, keepdim=True).sqrt()
    y = 5.0 + 30.0 * torch.relu(x @ inner / D_MODEL**0.5 - 1) @ outer
    return Pairs(list(zip(x.bfloat16().tensor_split(shards), y.bfloat16().tensor_split(shards), strict=True)))


@pytest.fixture(scope="module")
def data():
    return sparse_pairs(3001, seed=1), sparse_pairs(1000, seed=2)


@pytest.fixture(scope="module")
def trained(data):
    return train_bases(*data, SETTINGS, site=Site(4, OTHER))


@pytest.mark.parametrize("has_sparse", [True, False], ids=["sparse products", "none on this device"])
@pytest.mark.parametrize("cut_at", ["some", "none active"])
def test_gradients_are_those_of_the_dense_loss(cut_at, has_sparse, monkeypatch):
    """The same loss written with dense products and left to autograd."""
    assert stacked_bases.has_sparse_products("cpu")
    monkeypatch.setattr(stacked_bases, "has_sparse_products", lambda device: has_sparse)
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, width, generator=generator) for width in (D_MODEL, D_OUT))
    model = StackedBases(D_MODEL, D_OUT, 2, WIDTH, generator, "cpu")
    model.b_enc.normal_(generator=generator).mul_(0.1).sub_(100.0 if cut_at == "none active" else 0.0)
    found = model.backward(x, y, TARGETS, generator, torch.float32)
    for index, target in enumerate(TARGETS):
        plain = [parameter[index].clone().requires_grad_() for parameter in model.parameters]
        W_enc, b_enc, W_dec, b_dec = plain
        pre = x @ W_enc.T + b_enc
        acts = torch.where(pre > batch_cut(pre.detach(), target, generator), pre, 0.0)
        loss = (acts @ W_dec + b_dec - y).pow(2).mean()
        loss.backward()
        assert found.losses[index].item() == pytest.approx(loss.item(), rel=1e-5)
        assert torch.equal(found.fired[index], (acts > 0).any(0))
        assert bool((acts > 0).any()) == (cut_at == "some")
        for gradient, parameter in zip(model.gradients(), plain, strict=True):
            torch.testing.assert_close(gradient[index], parameter.grad, rtol=1e-4, atol=1e-7)


def test_realised_l0_is_within_a_tenth_of_the_target(trained):
    for target, one in zip(TARGETS, trained, strict=True):
        assert one.facts["target_l0"] == target
        assert one.facts["val_l0"] == pytest.approx(target, rel=0.1)


def test_training_explains_the_output_and_more_features_explain_more(trained, data):
    few, many = (one.facts["val_fvu"] for one in trained)
    (untrained, _) = train_bases(
        *data, BaseSettings(TARGETS, width=WIDTH, epochs=1, batch_size=3001, lr=1e-9), site=Site(4)
    )
    assert many < few < 0.7 * untrained.facts["val_fvu"]
    assert many < 0.25


def test_facts_are_those_of_the_transcoder_that_is_returned(trained, data):
    for one in trained:
        assert one.transcoder.site == Site(4, OTHER)
        assert (one.transcoder.d_in, one.transcoder.d_out, one.transcoder.d_sae) == (D_MODEL, D_MODEL, WIDTH)
        x, y = (column.float() for column in data[1].whole())
        error = (one.transcoder(x) - y).pow(2).sum() / (y - y.mean(0)).pow(2).sum()
        acts = one.transcoder.encode(x) > 0
        assert one.facts["val_fvu"] == pytest.approx(error.item(), rel=1e-4)
        assert one.facts["val_l0"] == pytest.approx(acts.sum(1).float().mean().item(), rel=1e-6)
        assert one.facts["dead_fraction"] == pytest.approx((~acts.any(0)).float().mean().item(), abs=1e-6)
        assert one.facts["tokens"] == 6 * 23 * 128, "23 full batches in 3001 tokens"
        assert one.facts["revived"] >= 0


def test_a_seed_gives_one_transcoder(trained, data):
    again = train_bases(*data, SETTINGS, site=Site(4))
    other = train_bases(*data, BaseSettings(**{**vars(SETTINGS), "seed": 4}), site=Site(4))
    for one, two, three in zip(trained, again, other, strict=True):
        assert all(
            torch.equal(getattr(one.transcoder, name), getattr(two.transcoder, name))
            for name in ("W_enc", "b_enc", "threshold", "W_dec", "b_dec")
        )
        assert one.facts == two.facts
        assert not torch.equal(one.transcoder.W_enc, three.transcoder.W_enc)


def test_bf16_comes_close(trained, data):
    half = train_bases(*data, BaseSettings(**{**vars(SETTINGS), "precision": "bf16"}), site=Site(4))
    for one, two in zip(trained, half, strict=True):
        assert two.transcoder.W_enc.dtype == torch.float32
        assert two.facts["val_fvu"] < one.facts["val_fvu"] + 0.05
        assert two.facts["val_l0"] == pytest.approx(one.facts["target_l0"], rel=0.1)


def test_silent_features_are_revived(data):
    """With many more features than the data needs and few active at once, some die in the first epoch."""
    sparse = BaseSettings([1.0], width=512, epochs=2, batch_size=128, lr=5e-3)
    (one,) = train_bases(*data, sparse, site=Site(0))
    (never,) = train_bases(*data, BaseSettings(**{**vars(sparse), "epochs": 1}), site=Site(0))
    assert one.facts["revived"] > 0
    assert never.facts["revived"] == 0


def test_reports_count_every_step(data):
    seen = []
    train_bases(*data, replace(SETTINGS, target_l0=[4.0]), site=Site(0), report=lambda *one: seen.append(one))
    assert [step for step, *_ in seen][-1] == seen[-1][1] == 6 * 23
    assert seen[-1][2]["train_fvu"] < seen[0][2]["train_fvu"]


def test_a_loss_that_is_not_finite_ends_training(data):
    x, y = data[0].whole()
    broken = Pairs([(x, y.clone().index_fill_(0, torch.tensor([7]), torch.nan))])
    with pytest.raises(DivergedError, match="the loss of layer 9 is nan"):
        train_bases(broken, data[1], SETTINGS, site=Site(9))


def test_scale_is_the_mean_and_the_overall_deviation(data):
    _, y = data[0].whole()
    scale = output_scale(data[0])
    torch.testing.assert_close(scale.mean, y.float().mean(0), rtol=1e-4, atol=1e-3)
    assert scale.deviation**2 == pytest.approx(y.float().var(0, unbiased=False).mean().item(), rel=1e-4)


@pytest.mark.parametrize("batch_size", [7, 200, 4096])
def test_the_cut_lets_exactly_the_target_through(batch_size):
    pairs = sparse_pairs(500, seed=5)
    generator = torch.Generator().manual_seed(0)
    W_enc, b_enc = torch.randn(D_MODEL, WIDTH, generator=generator), torch.randn(WIDTH, generator=generator)
    b_enc[0] = 100.0  # one feature that is always on takes its place in the count
    cut = calibrated_cut(W_enc, b_enc, pairs, 3.0, batch_size=batch_size)
    pre = pairs.whole()[0].float() @ W_enc + b_enc
    assert (pre > cut).sum().item() == 3 * 500


def test_the_cut_is_never_negative():
    pairs = sparse_pairs(50, seed=5)
    assert calibrated_cut(torch.zeros(D_MODEL, 8), torch.full((8,), -1.0), pairs, 4.0) == 0.0


def test_figures_of_a_perfect_and_of_a_silent_transcoder(data):
    x, _ = data[1].whole()
    silent = Transcoder(
        W_enc=torch.zeros(D_MODEL, 3),
        b_enc=torch.zeros(3),
        threshold=torch.ones(3),
        W_dec=torch.zeros(3, D_MODEL),
        b_dec=x.float().mean(0),
        site=Site(0),
    )
    figures = reconstruction_figures(silent, Pairs([(x, x)]))
    assert figures["val_fvu"] == pytest.approx(1.0, abs=1e-5)
    assert (figures["val_l0"], figures["dead_fraction"]) == (0.0, 1.0)


@pytest.mark.parametrize("limit", [1.0, 2.0, 1000.0])
def test_clipping_one_model_is_clipping_several_to_the_last_bit(limit):
    generator = torch.Generator().manual_seed(0)
    several = [torch.randn(3, 64, 5, generator=generator), torch.randn(3, 2, generator=generator)]
    alone = [one[1:2].clone() for one in several]
    norms, norm = clip_each(several, limit), clip_each(alone, limit)
    assert torch.equal(norm, norms[1:2])
    for one, other in zip(alone, several, strict=True):
        assert torch.equal(one, other[1:2])


def test_clipping_looks_at_one_model_at_a_time():
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3, 4, 5, generator=generator), torch.randn(3, 2, generator=generator)]
    gradients[0][1] *= 100
    gradients[1][2] *= 0.001
    gradients[0][2] *= 0.001
    before = [one.clone() for one in gradients]
    norms = clip_each(gradients, 2.0)
    for model in range(3):
        norm = math.sqrt(sum(one[model].pow(2).sum().item() for one in before))
        assert norms[model].item() == pytest.approx(norm, rel=1e-5)
        for one, was in zip(gradients, before, strict=True):
            torch.testing.assert_close(one[model], was[model] * min(1.0, 2.0 / norm), rtol=1e-5, atol=0)

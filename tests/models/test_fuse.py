"""A fused transcoder against base and delta run apart; and what does not belong together is refused."""

import dataclasses

import pytest
import torch

from models.errors import ModelError
from models.fuse import fuse
from sites import MLP, Site

D_MODEL, D_SAE, D_NEW = 16, 48, 6


@pytest.fixture
def base(random_transcoder):
    return random_transcoder(D_MODEL, D_SAE, layer=3, seed=0)


@pytest.fixture
def delta(random_transcoder):
    return random_transcoder(D_MODEL, D_NEW, layer=3, seed=1, bias=False)


@pytest.fixture
def x():
    return torch.randn(2, 50, D_MODEL, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("alpha", [1.0, 0.25, 0.0, -1.5, 10.0])
def test_output_is_base_plus_alpha_delta(base, delta, x, alpha):
    fused = fuse(base, delta, alpha)
    assert delta(x).abs().max() > 0.1
    torch.testing.assert_close(fused(x), base(x) + alpha * delta(x), rtol=1e-5, atol=1e-5)


def test_base_features_come_first_and_no_activation_changes(base, delta, x):
    acts = fuse(base, delta, alpha=0.5).encode(x)
    assert acts.shape == (2, 50, D_SAE + D_NEW)
    torch.testing.assert_close(acts[..., :D_SAE], base.encode(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(acts[..., D_SAE:], delta.encode(x), rtol=1e-5, atol=1e-6)


def test_layer_taps_and_bias_are_the_bases(base, delta):
    site = Site(3, dataclasses.replace(MLP, writes=("mlp.hook_out",)))
    fused = fuse(dataclasses.replace(base, site=site), dataclasses.replace(delta, site=site))
    assert fused.site == site
    assert torch.equal(fused.b_dec, base.b_dec)
    assert fuse(dataclasses.replace(base, b_dec=None), delta).b_dec is None


def test_neither_part_is_changed(base, delta):
    before = [delta.W_dec.clone(), base.W_dec.clone()]
    fuse(base, delta, alpha=3.0).W_dec.zero_()
    assert torch.equal(delta.W_dec, before[0])
    assert torch.equal(base.W_dec, before[1])


@pytest.mark.parametrize(
    ("part", "change", "said"),
    [
        ("delta", {"site": Site(4)}, "the delta: made for layer 4, not for layer 3"),
        ("base", {"site": Site(3, dataclasses.replace(MLP, writes=("mlp.hook_out",)))}, "and mlp.hook_out"),
        (
            "delta",
            {"site": Site(3, dataclasses.replace(MLP, reads="hook_resid_mid"))},
            "the delta: reads hook_resid_mid",
        ),
        ("delta", {"b_dec": torch.zeros(D_MODEL)}, "the delta has a decoder bias"),
    ],
)
def test_what_does_not_belong_together_is_refused(base, delta, part, change, said):
    parts = {"base": base, "delta": delta}
    parts[part] = dataclasses.replace(parts[part], **change)
    with pytest.raises(ModelError, match=said):
        fuse(**parts)


def test_another_d_model_is_refused(base, random_transcoder):
    with pytest.raises(ModelError, match="the delta: reads 8 dimensions, but the MLP of layer 3 of the model reads 16"):
        fuse(base, random_transcoder(8, D_NEW, layer=3, seed=1, bias=False))


@pytest.mark.parametrize("alpha", [float("nan"), float("inf")])
def test_an_alpha_that_is_no_number_is_refused(base, delta, alpha):
    with pytest.raises(ModelError, match="must be a finite number"):
        fuse(base, delta, alpha)

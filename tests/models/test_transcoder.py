"""JumpReLU against its formula, element by element; and the refusal of transcoders that do not fit a model."""

import dataclasses

import pytest
import torch

from models.errors import ModelError
from models.transcoder import Transcoder, check_fits, jump_relu, with_bos, without_bos
from sites import MLP, READINGS, Site


def test_output_is_the_formula(random_transcoder):
    transcoder = random_transcoder(6, 10, layer=0, seed=3)
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    acts, output = transcoder.encode(x), transcoder(x)
    for token in range(5):
        expected = transcoder.b_dec.clone()
        for feature in range(10):
            pre = float(x[token] @ transcoder.W_enc[:, feature] + transcoder.b_enc[feature])
            act = pre if pre > max(0.0, float(transcoder.threshold[feature])) else 0.0
            assert acts[token, feature].item() == pytest.approx(act, abs=1e-5)
            expected += act * transcoder.W_dec[feature]
        torch.testing.assert_close(output[token], expected, rtol=1e-4, atol=1e-5)
    assert 0 < (acts > 0).float().mean() < 1


def test_jump_at_and_below_the_threshold():
    pre = torch.tensor([-2.0, -0.5, 0.0, 0.5, 0.75, 1.0])
    assert jump_relu(pre, torch.tensor(0.5)).tolist() == [0, 0, 0, 0, 0.75, 1]
    assert jump_relu(pre, torch.tensor(-1.0)).tolist() == [0, 0, 0, 0.5, 0.75, 1], "a negative threshold is a relu"


def test_without_a_decoder_bias_nothing_is_added(random_transcoder):
    delta = random_transcoder(6, 10, layer=0, seed=3, bias=False)
    silent = dataclasses.replace(delta, threshold=torch.full((10,), 1e9))
    assert torch.equal(silent(torch.randn(4, 6)), torch.zeros(4, 6))


@pytest.mark.parametrize(
    ("name", "shape", "said"),
    [
        ("W_enc", (6,), "W_enc has shape (6,)"),
        ("W_dec", (6, 10), "W_dec has shape (6, 10), expected (10, 10)"),
        ("W_dec", (10,), "W_dec has shape (10,), expected (d_sae, d_out)"),
        ("b_enc", (9,), "b_enc has shape (9,), expected (10,)"),
        ("threshold", (1, 10), "threshold has shape (1, 10), expected (10,)"),
        ("b_dec", (10,), "b_dec has shape (10,), expected (6,)"),
    ],
)
def test_wrong_shapes_are_refused(random_transcoder, name, shape, said):
    with pytest.raises(ModelError) as raised:
        dataclasses.replace(random_transcoder(6, 10, layer=0, seed=0), **{name: torch.zeros(shape)})
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"d_in": 8}, "reads 6 dimensions, but the MLP of layer 2 of the model reads 8"),
        ({"d_out": 8}, "writes 6 dimensions, but the MLP of layer 2 of the model writes 8"),
        ({"site": Site(1)}, "made for layer 2, not for layer 1"),
        ({"site": Site(2, READINGS["resid_mid/sqrt(d_model)"])}, "ln2.hook_normalized"),
        ({"site": Site(2, dataclasses.replace(MLP, writes=("mlp.hook_out",)))}, "mlp.hook_out"),
    ],
)
def test_a_transcoder_of_another_model_is_refused(random_transcoder, model, said):
    transcoder = random_transcoder(6, 10, layer=2, seed=0)
    fits = {"site": Site(2), "d_in": 6, "d_out": 6, "origin": "deltas/x"}
    check_fits(transcoder, **fits)
    with pytest.raises(ModelError) as raised:
        check_fits(transcoder, **{**fits, **model})
    assert str(raised.value).startswith("deltas/x: ")
    assert said in str(raised.value)


def test_a_feature_at_bos_is_silent_elsewhere_and_can_be_left_out(random_transcoder):
    delta = random_transcoder(6, 4, layer=1, seed=1, bias=False)
    direction, x = torch.arange(6.0), 100 * torch.randn(50, 6)
    more = with_bos(delta, direction)
    assert delta.at_bos is None
    assert more.at_bos.tolist() == [0, 0, 0, 0, 1]
    assert torch.equal(more.at_bos @ more.W_dec, direction)
    assert (delta.d_new, more.d_new, more.d_sae) == (4, 4, 5)
    assert torch.equal(more(x), delta(x))
    back = without_bos(more)
    assert all(torch.equal(getattr(back, name), getattr(delta, name)) for name in ("W_enc", "b_enc", "W_dec"))
    assert without_bos(delta) is delta


def test_moving_keeps_everything(random_transcoder):
    moved = random_transcoder(6, 10, layer=2, seed=0, bias=False).to("cpu")
    assert isinstance(moved, Transcoder)
    assert (moved.site, moved.b_dec, moved.d_in, moved.d_out, moved.d_sae) == (Site(2), None, 6, 6, 10)

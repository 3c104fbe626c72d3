"""Packed weights: the products are the plain ones up to rounding, and always those of the weights as they are now."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import nn

from models import packed as file
from models.packed import is_packed, packed


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(40, 72), nn.SiLU(), nn.Linear(72, 24, bias=False)).to(dtype)


@pytest.mark.parametrize("shape", [(40,), (1, 40), (16, 40), (3, 5, 40), (2, 300, 40)])
def test_products_are_the_plain_ones(shape: tuple[int, ...]) -> None:
    layers, x = model(), torch.randn(shape)
    with torch.inference_mode():
        plain = layers(x)
        with packed(layers):
            assert "forward" in layers[0].__dict__, "otherwise there is nothing to test"
            ours = layers(x)
        assert torch.equal(layers(x), plain)
    assert ours.shape == plain.shape
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)


def test_exchanged_weights_are_packed_anew() -> None:
    layers, x = model(), torch.randn(4, 40)
    own, other = layers[0].weight.data, torch.randn(72, 40)
    with torch.inference_mode():
        for weight in (own, other, own):
            layers[0].weight.data = weight
            with packed(layers):
                ours = layers(x)
            torch.testing.assert_close(ours, layers(x), rtol=1e-5, atol=1e-5)


def test_weights_that_were_trained_in_between_are_packed_anew() -> None:
    layers, x = model(), torch.randn(4, 40)
    with torch.inference_mode(), packed(layers):
        before = layers(x)
    optimizer = torch.optim.SGD(layers.parameters(), lr=1.0)
    layers(x).square().sum().backward()
    optimizer.step()
    with torch.inference_mode(), packed(layers):
        after = layers(x)
    torch.testing.assert_close(after, layers(x).detach(), rtol=1e-5, atol=1e-4)
    assert not torch.allclose(before, after)


def test_memory_that_was_freed_and_used_again_is_packed_anew() -> None:
    layers, x = model(), torch.randn(4, 40)
    reused = 0
    with torch.inference_mode():
        for _ in range(1000):  # how often the allocator gives the same memory again depends on what ran before
            if reused == 3:
                break
            place = layers[0].weight.data_ptr()
            layers[0].weight.data = torch.empty(0)
            gc.collect()
            layers[0].weight.data = torch.randn(72, 40)
            reused += layers[0].weight.data_ptr() == place
            with packed(layers):
                ours = layers(x)
            torch.testing.assert_close(ours, layers(x), rtol=1e-5, atol=1e-5)
    assert reused, "otherwise there is nothing to test"


def test_a_copy_is_made_once() -> None:
    layers = model()
    assert not is_packed(layers)
    with packed(layers):
        first = file._COPIES[layers[0]]
    assert is_packed(layers)
    with packed(layers):
        assert file._COPIES[layers[0]] is first
    layers[2].weight.data = torch.randn(24, 72)
    assert not is_packed(layers)


def test_the_layers_are_as_before_after_an_error() -> None:
    layers = model()
    with pytest.raises(ValueError, match="in between"), packed(layers):
        raise ValueError("in between")
    assert "forward" not in layers[0].__dict__


def test_other_dtypes_and_large_models_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = model(torch.bfloat16)
    with packed(halves):
        assert "forward" not in halves[0].__dict__
    layers = model()
    monkeypatch.setattr(file, "MOST_BYTES", layers[0].weight.nbytes)
    with packed(layers):
        assert "forward" not in layers[0].__dict__

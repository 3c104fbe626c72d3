"""Packed weights: the products are the plain ones up to rounding, and always those of the weights as they are now."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.nn import functional

from models import packed as file
from models.packed import PAYS_AT, PackedLinear, drop_unused, forget, is_packed, pack, packed


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(40, 72), nn.SiLU(), nn.Linear(72, 24, bias=False)).to(dtype)
    pack(layers)
    return layers


def unpacked(layers: nn.Sequential) -> nn.Sequential:
    same = nn.Sequential(nn.Linear(40, 72), nn.SiLU(), nn.Linear(72, 24, bias=False)).to(layers[0].weight.dtype)
    same.load_state_dict(layers.state_dict())
    return same


def plain(layers: nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    return unpacked(layers)(x)


def copies_of(layers: nn.Sequential) -> list[object]:
    return [file._found(layer.weight) for layer in layers if isinstance(layer, PackedLinear)]


@pytest.mark.parametrize("shape", [(40,), (1, 40), (16, 40), (3, 5, 40), (2, 300, 40)])
def test_products_are_the_plain_ones(shape: tuple[int, ...]) -> None:
    layers, x = model(), torch.randn(shape)
    with torch.inference_mode():
        expected = plain(layers, x)
        with packed():
            ours = layers(x)
        assert None not in copies_of(layers), "otherwise there is nothing to test"
    assert ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("rows", "pays"), [(PAYS_AT - 1, False), (PAYS_AT, True)])
def test_many_rows_use_copies_always_and_few_never(rows: int, pays: bool) -> None:
    """Whatever ran before: otherwise the last bits of a figure would depend on it."""
    layers, x = model(), torch.randn(rows, 40)
    with torch.inference_mode():
        first = layers(x)
        assert is_packed(layers) == pays
        with packed():
            layers(x[:1])
        assert is_packed(layers)
        assert torch.equal(layers(x), first)
        assert torch.equal(first, plain(layers, x)) or pays


def test_gradients_are_those_of_the_plain_layer() -> None:
    layers, x = model(), torch.randn(PAYS_AT, 40)
    layers(x).square().sum().backward()
    assert not is_packed(layers)
    ours = [parameter.grad for parameter in layers.parameters()]
    same = unpacked(layers)
    same(x).square().sum().backward()
    assert all(torch.equal(mine, other.grad) for mine, other in zip(ours, same.parameters(), strict=True))


@pytest.mark.parametrize("steps", [False, True])
def test_autocast_and_other_inputs_compute_as_they_did(steps: bool) -> None:
    """As in a joint polish on a CPU with bf16, whose validation passes have no gradients."""
    layers, x = model(), torch.randn(PAYS_AT, 40)
    with torch.no_grad(), packed() if steps else nullcontext():
        with torch.autocast("cpu", torch.bfloat16):
            ours, expected = layers(x), unpacked(layers)(x)
            assert torch.equal(layers(x.bfloat16()), unpacked(layers)(x.bfloat16()))
        assert ours.dtype == expected.dtype == torch.bfloat16
        assert torch.equal(ours, expected)
        assert layers(x[:0]).shape == (0, 24)


def test_exchanged_weights_have_copies_of_their_own() -> None:
    layers, x = model(), torch.randn(4, 40)
    own, other = layers[0].weight.data, torch.randn(72, 40)
    found = []
    with torch.inference_mode():
        for weight in (own, other, own, other):
            layers[0].weight.data = weight
            with packed():
                ours = layers(x)
            found.append(file._found(layers[0].weight))
            torch.testing.assert_close(ours, plain(layers, x), rtol=1e-5, atol=1e-5)
    assert found[0] is found[2]
    assert found[1] is found[3]


@pytest.mark.parametrize("written", ["by SGD", "by a fused optimiser", "by PEFT's merging"])
def test_weights_that_were_written_to_in_between_are_packed_anew(written: str) -> None:
    """Torch counts only the first kind of write."""
    layers, x = model(), torch.randn(PAYS_AT, 40)
    with torch.inference_mode():
        before = layers(x)
    if written == "by PEFT's merging":
        layers[0].weight.data += 0.1 * torch.randn(72, 40)
    else:
        sgd = written == "by SGD"
        layers(x).square().sum().backward()
        optimizer = (
            torch.optim.SGD(layers.parameters(), lr=1.0) if sgd else torch.optim.AdamW(layers.parameters(), fused=True)
        )
        optimizer.step()
    with torch.inference_mode():
        after = layers(x)
    torch.testing.assert_close(after, plain(layers, x).detach(), rtol=1e-5, atol=1e-4)
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
            with packed():
                ours = layers(x)
            torch.testing.assert_close(ours, plain(layers, x), rtol=1e-5, atol=1e-5)
    assert reused, "otherwise there is nothing to test"


def test_a_transposed_weight_in_the_same_memory_has_a_copy_of_its_own() -> None:
    square = nn.Linear(32, 32, bias=False)
    pack(square)
    x, weight = torch.randn(PAYS_AT, 32), square.weight.data
    with torch.inference_mode():
        for seen in (weight, weight.T):
            square.weight.data = seen
            torch.testing.assert_close(square(x), x @ seen.T, rtol=1e-5, atol=1e-5)


def test_a_copy_goes_with_its_weight() -> None:
    layers, x = model(), torch.randn(PAYS_AT, 40)
    with torch.inference_mode():
        layers(x)
        places = [file._place(layer.weight) for layer in layers if isinstance(layer, PackedLinear)]
        assert set(places) <= file._COPIES.keys()
        del layers
        gc.collect()
        drop_unused()
    assert not file._COPIES.keys() & set(places)


def test_a_deep_copy_computes_with_its_own_weights() -> None:
    layers, x = model(), torch.randn(PAYS_AT, 40)
    with torch.inference_mode():
        first = layers(x)
    copied = deepcopy(layers)
    with torch.inference_mode():
        assert torch.equal(copied(x), first)
        copied[0].weight *= 2
        torch.testing.assert_close(copied(x), plain(copied, x), rtol=1e-5, atol=1e-5)
        assert torch.equal(layers(x), first)
        assert copied.double()(x.double()).dtype == torch.float64


def test_without_room_for_a_copy_the_product_is_the_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, x = model(), torch.randn(PAYS_AT, 40)
    forget()
    monkeypatch.setattr(file, "MOST_BYTES", layers[0].weight.nbytes)
    with torch.inference_mode():
        hidden = layers[1](layers[0](x))
        assert file._found(layers[0].weight) is not None
        assert torch.equal(layers[2](hidden), functional.linear(hidden, layers[2].weight))
    assert file._found(layers[2].weight) is None


def test_few_rows_are_plain_again_after_an_error() -> None:
    layers = model()
    with pytest.raises(ValueError, match="in between"), packed():
        raise ValueError("in between")
    with torch.inference_mode():
        layers(torch.randn(1, 40))
    assert not is_packed(layers)


def test_other_dtypes_and_large_models_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    halves = model(torch.bfloat16)
    x = torch.randn(PAYS_AT, 40)
    with torch.inference_mode(), packed():
        assert torch.equal(halves(x.bfloat16()), plain(halves, x.bfloat16()))
    large = nn.Sequential(nn.Linear(40, 72), nn.Linear(72, 24))
    monkeypatch.setattr(file, "MOST_BYTES", large[0].weight.nbytes)
    pack(large)
    assert all(type(layer) is nn.Linear for layer in large)

"""Number formats: `auto` follows the device, products under bf16 are bf16, nothing changes under fp32."""

import pytest
import torch

from trainers import precision


@pytest.mark.parametrize(("has", "found"), [(True, "bf16"), (False, "fp32")])
def test_auto_follows_the_device(monkeypatch, has, found):
    monkeypatch.setattr(precision, "_cpu_has_bf16", lambda: has)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: has)
    assert precision.resolve_precision("auto", "cpu") == found
    assert precision.resolve_precision("auto", "cuda:1") == found


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_an_explicit_precision_is_kept(asked):
    assert precision.resolve_precision(asked, "cpu") == asked


def test_this_machine_answers():
    assert precision.resolve_precision("auto", "cpu") in ("fp32", "bf16")


@pytest.mark.parametrize(("asked", "dtype"), [("fp32", "float32"), ("tf32", "float32"), ("bf16", "bfloat16")])
def test_a_precision_has_its_dtype_and_leaves_nothing_behind(asked, dtype):
    before = torch.get_float32_matmul_precision()
    with precision.number_format("cpu", asked) as found:
        assert found == getattr(torch, dtype)
    assert torch.get_float32_matmul_precision() == before

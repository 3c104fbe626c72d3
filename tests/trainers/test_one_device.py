"""No step of a delta mixes devices: seen without a GPU, on torch's device `meta`, which computes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from trainers.stacked_deltas import StackedDeltas, Start
from trainers.stacked_optimiser import clip_each


class OneDevice(TorchDispatchMode):
    """Raises where an operation other than a copy meets tensors of two devices; numbers may come from anywhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        met = {one.device.type for one in tree_flatten((args, kwargs))[0] if isinstance(one, torch.Tensor) and one.ndim}
        assert len(met) < 2 or func is torch.ops.aten.copy_.default, f"{func} on {sorted(met)}"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_delta_step_stays_on_its_device(dtype: torch.dtype) -> None:
    x, residual = torch.empty(2, 100, 32, device="meta")
    with OneDevice():
        model = StackedDeltas(Start(x, residual), replicas=2, d_new=8, l0_budget=3.0, seed=0)
        losses = model.backward(x.to(dtype), residual.to(dtype), torch.zeros((), device="meta"))
        clip_each(model.gradients(), 1.0)
        model.steer(losses.on, torch.full((2,), 300.0, device="meta"))
    made = [losses.error, losses.penalty, losses.on, *model.gradients(), *model.tensors().values()]
    assert {one.device.type for one in made} == {"meta"}


def test_a_tensor_on_another_device_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"aten\.mm\.default on \['cpu', 'meta'\]"), OneDevice():
        torch.empty(3, 4, device="meta") @ torch.empty(4, 3)

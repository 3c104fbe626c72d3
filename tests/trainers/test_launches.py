"""How many operations a step of training dispatches, about as many as kernels that a GPU would have to start."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from trainers.activations import Pairs
from trainers.delta_data import DeltaData
from trainers.delta_stack import DeltaSettings, Stack
from trainers.stacked_bases import StackedBases
from trainers.stacked_optimiser import clip_each

VIEWS = {
    *("view", "t", "transpose", "slice", "select", "expand", "detach", "unsqueeze", "squeeze", "split", "permute"),
    *("as_strided", "alias", "diagonal", "empty", "empty_like", "unbind", "_unsafe_view"),
    *("_record_function_enter_new", "_record_function_exit", "sparse_compressed_tensor", "values"),
}
"""Operations that compute nothing."""


class Counted(TorchDispatchMode):
    """Counts operations, and names those that make a device and Python wait for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.waits = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        self.count += name not in VIEWS
        self.waits += name in ("_local_scalar_dense", "nonzero", "is_nonzero")
        return func(*args, **(kwargs or {}))


def pairs(tokens: int) -> Pairs:
    generator = torch.Generator().manual_seed(tokens)
    x, y = (torch.randn(tokens, 32, generator=generator) for _ in range(2))
    return Pairs([(x, y)])


@pytest.mark.parametrize(
    ("runs", "threshold", "most"), [(1, "calibrated", 39), (1, "learned", 45), (4, "calibrated", 66)]
)
def test_a_delta_step_starts_few_kernels_and_waits_for_none(runs: int, threshold: str, most: int) -> None:
    """On a GPU they are recorded, so that one launch starts them all; four runs cost little more than one."""
    asked = [
        DeltaSettings(d_new=8, batch_size=64, threshold=threshold, lr=1e-3 * number) for number in range(1, runs + 1)
    ]
    stack = Stack(DeltaData(pairs(256), pairs(64), 1.0, 1.0, 0, "change"), asked, "cpu")
    for number, (x, residual) in enumerate(stack.batches()):
        with Counted() as counted:
            stack.step(x, residual)
        if number == 1:  # the first sets the optimiser up
            break
    assert counted.count <= most
    assert counted.waits == 0


def test_a_step_of_three_bases_starts_few_kernels() -> None:
    """It waits once for each base, to know how many activations passed the cut."""
    generator = torch.Generator().manual_seed(0)
    model = StackedBases(32, 32, 3, 128, generator, "cpu")
    optimiser = torch.optim.Adam(model.parameters, fused=True)
    (x, y), targets = pairs(64).shards[0], [2.0, 4.0, 8.0]
    for _ in range(2):
        with Counted() as counted:
            model.backward(x, y, targets, generator, torch.float32)
            clip_each(model.gradients(), 1.0)
            optimiser.step()
    assert counted.count <= 136
    assert counted.waits == 3

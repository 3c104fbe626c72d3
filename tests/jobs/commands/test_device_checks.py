"""The checks of a device, on the CPU: bf16 lies within what is allowed, and what differs is named."""

from __future__ import annotations

import math

import pytest
import torch

from jobs.commands.device_checks import ALLOWED, CHECKS, Check, Finding, examine
from jobs.commands.doctor import summary


@pytest.mark.parametrize(
    "check", [one for one in CHECKS if one.name in ("delta training", "capture")], ids=lambda one: one.name
)
def test_bf16_is_near_fp32(check: Check) -> None:
    exact, rounded = examine("cpu", [check])
    assert (exact.precision, rounded.precision) == ("fp32", "bf16"), "tf32 is a GPU's"
    assert exact.difference == 0.0
    assert 0 < rounded.difference <= ALLOWED["bf16"]


@pytest.mark.parametrize("wrong", [1.01, math.nan], ids=["another number", "not a number"])
def test_a_check_that_differs_is_named(wrong: float) -> None:
    answers = iter([torch.ones(2), torch.tensor([1.0, wrong])])
    (found,) = examine("cpu", [Check("a sum", lambda scratch, device, precision: next(answers))])
    assert not found.agrees
    name, said, good = summary("gpu 0", [found, Finding("another", "bf16", 0.01, 0.1)])
    assert (name, good) == ("gpu 0 computes", False)
    assert said == f"a sum in fp32 differs by {found.difference:.2g} of its size, allowed 0.0001"


def test_a_device_that_agrees_is_said_to() -> None:
    findings = [Finding("one", "fp32", 1e-6, 1e-4), Finding("another", "bf16", 0.01, 0.1)]
    assert summary("gpu 1", findings) == ("gpu 1 computes", "as the CPU does (2 checks)", True)

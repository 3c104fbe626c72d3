"""Does a device compute what the CPU does?

In: a device. Out: for each check and number format, the difference of its figures from the CPU's in fp32, and the
allowed difference. Nothing here needs Ray, so torch, transformers, PEFT and TransformerLens are enough to run it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from jobs.commands import device_figures as figures_of

if TYPE_CHECKING:
    from torch import Tensor

ALLOWED = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 1e-1}
"""Allowed difference by format: the norm of the differences over the norm of the figures."""


@dataclass(frozen=True)
class Check:
    """`figures(folder, device, precision)` returns what to compare, (any number,), on the CPU."""

    name: str
    figures: Callable[[Path, str, str], Tensor]
    formats: Sequence[str] = ("fp32",)


class Finding(NamedTuple):
    """A check on a device: the relative difference of its figures from the CPU's, and the allowed one."""

    check: str
    precision: str
    difference: float
    allowed: float

    @property
    def agrees(self) -> bool:
        return self.difference <= self.allowed  # False for NaN


def examine(device: str, checks: Sequence[Check] | None = None) -> Iterator[Finding]:
    """Runs each check in each of its formats that the device supports."""
    with tempfile.TemporaryDirectory() as scratch:
        for check in CHECKS if checks is None else checks:
            expected = check.figures(Path(scratch), "cpu", "fp32").double()
            for precision in check.formats:
                if precision != "tf32" or device.startswith("cuda"):
                    found = check.figures(Path(scratch), device, precision).double()
                    difference = (found - expected).norm() / expected.norm().clamp(min=1e-12)
                    yield Finding(check.name, precision, difference.item(), ALLOWED[precision])


EVERY = ("fp32", "tf32", "bf16")
CHECKS = (
    Check("delta training", figures_of.delta_training, EVERY),
    Check("base training", figures_of.base_training, EVERY),
    Check("LoRA, Gemma-2", figures_of.lora_training("gemma"), EVERY),
    Check("LoRA, Llama", figures_of.lora_training("llama"), EVERY),
    Check("capture", figures_of.capture, ("fp32", "bf16")),
    Check("joint polish", figures_of.polish, ("fp32", "bf16")),
    Check("evaluation on MLPs, Gemma-2", figures_of.evaluation("gemma", "path")),
    Check("evaluation on MLPs, Llama", figures_of.evaluation("llama", "path")),
    Check("evaluation on bases, Gemma-2", figures_of.evaluation("gemma", "base")),
)

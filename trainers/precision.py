"""Number formats for training, by device.

In: a device and `auto`, `fp32`, `tf32` or `bf16`. Out: the dtype, or a context in which matrix products use the format.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


def resolve_precision(precision: str, device: str) -> str:
    """Resolves `auto`: bf16 if the device multiplies it faster than fp32 (recent GPUs, CPUs with bf16 instructions)."""
    if precision != "auto":
        return precision
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.is_bf16_supported() else "fp32"
    return "bf16" if _cpu_has_bf16() else "fp32"


def dtype_of(precision: str) -> torch.dtype:
    """The dtype of weights and activations; tf32 is only a way to multiply fp32."""
    return {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16}[precision]


@contextlib.contextmanager
def number_format(device: str, precision: str) -> Iterator[torch.dtype]:
    """Sets the precision of matrix products, for code that casts its own operands to the dtype yielded.

    On a GPU, products that stay in fp32 when others are bf16 use tf32, which keeps more digits than bf16 does.
    """
    before = torch.get_float32_matmul_precision()
    if device.startswith("cuda"):
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    try:
        yield dtype_of(precision)
    finally:
        torch.set_float32_matmul_precision(before)


def _cpu_has_bf16() -> bool:
    supported = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return bool(supported and supported())

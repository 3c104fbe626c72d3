"""The GPU that the tests in this folder need; elsewhere they are skipped. They run without Ray:
`python -m pytest tests/gpu`."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session", autouse=True)
def device() -> str:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that torch can use")
    return "cuda"

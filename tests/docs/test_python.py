"""The blocks of docs/python.md, run one after the other as they stand, on a tiny model."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from models.blocks import exchanged
from tests.end_to_end.conftest import REPOSITORY

PAGE = "docs/python.md"


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the page's lines define."""
    found: dict[str, Any] = {}
    text = (REPOSITORY / PAGE).read_text()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("notebook"))
        for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
            above = "\n" * text[: block.start(1)].count("\n")  # so that a traceback names the page's own line
            exec(compile(above + block[1], PAGE, "exec"), found)
        found["folder"] = Path.cwd()
    return found


def test_the_deltas_learn_the_change(names: dict[str, Any]) -> None:
    for one in names["trained"].values():
        assert one.figures["val_unexplained"] < 0.5
        assert 0 < one.figures["val_l0_delta"] < 20


def test_the_splice_goes_from_the_one_model_to_the_other(names: dict[str, Any]) -> None:
    nats, raw = names["nats"], sum(names["nats"]("raw"))
    apart, half, full = (sum(nats("alpha", alpha)) for alpha in (0.0, 0.5, 1.0))
    assert raw < full < half < apart
    with exchanged(names["bridge"], list(names["unfinetuned"].values())):
        swapped = sum(nats("raw"))
    assert apart == pytest.approx(swapped, rel=1e-5), "alpha 0 is the model with un-finetuned MLPs"
    assert names["share"].low > 0.4
    assert names["share"].value == pytest.approx((apart - full) / (apart - raw), rel=1e-5)


def test_a_delta_comes_back_from_disk(names: dict[str, Any]) -> None:
    for name in ("W_enc", "b_enc", "threshold", "W_dec"):
        assert torch.equal(getattr(names["again"], name), getattr(names["deltas"][names["sites"][1]], name))

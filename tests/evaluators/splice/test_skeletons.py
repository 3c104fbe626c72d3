"""The skeletons in docs/adding.md, run as they stand: a new condition, and the two ends of a new kind of site."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluators.conditions import CONDITIONS
from evaluators.splice.interventions import Edit
from evaluators.splice.teacher_forcing import Job, score
from sites import KINDS

PAGE = Path(__file__).parents[3] / "docs" / "adding.md"


@pytest.fixture(scope="module")
def names() -> Any:
    """What the page's lines define; they are taken back afterwards."""
    found: dict[str, Any] = {}
    before = dict(CONDITIONS), dict(KINDS)
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        exec(compile(block, str(PAGE), "exec"), found)
    yield found
    for registry, entries in zip((CONDITIONS, KINDS), before, strict=True):
        registry.clear()
        registry.update(entries)


def test_the_condition_is_half_the_delta(subject, names) -> None:
    jobs = [Job(row, 0.5) for row in subject.encoded]
    half, at_half = (score(subject.passes, Edit(subject.patch, name), jobs) for name in ("half_delta", "alpha"))
    assert [one.nll for one in half] == pytest.approx([one.nll for one in at_half])
    assert names["half"](torch.ones(1), torch.ones(1), torch.ones(1), torch.ones(1)) == 1.5


def test_the_new_kind_of_site_sees_the_gate(subject, names) -> None:
    mlp = subject.bridge.blocks[1].mlp
    if not hasattr(mlp, "gate"):
        pytest.skip("this architecture has no gate")
    ids = torch.tensor([subject.encoded[0].ids])
    with torch.no_grad():
        x, y = names["look"](subject.bridge, 1, ids)
    assert x.shape == (1, ids.shape[1], subject.d_model)
    gate = subject.bridge.original_model.get_submodule("model.layers.1.mlp.gate_proj")
    assert y.shape == (1, ids.shape[1], gate.weight.shape[0])

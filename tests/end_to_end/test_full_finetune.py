"""The study's pair without LoRA: every weight of a sweep's model learns that sweep's rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM

from benchmarks import full_finetune


def test_every_weight_learns(finished: tuple[Path, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full_finetune.main("tiny", [f"storage.root={finished[0]}"], tmp_path / "full", steps=30, batch_size=4, lr=3e-3)
    (folder,) = (finished[0] / "models").iterdir()
    before, after = (
        dict(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).named_parameters())
        for path in (folder, tmp_path / "full")
    )
    assert [name for name in before if torch.equal(before[name], after[name])] == []
    losses = [
        float(line.rpartition(" ")[2]) for line in capsys.readouterr().out.splitlines() if line.startswith("step")
    ]
    assert losses[-1] < losses[0]


def test_a_sweep_without_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as error:
        full_finetune.main("tiny", [f"storage.root={tmp_path}"], tmp_path / "full")
    assert error.value.exit_code == 2
    assert "start the sweep first" in capsys.readouterr().err

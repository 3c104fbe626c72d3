"""The lines of docs/formats.md, run as they stand on a finished study: the knob by hand is the sweep's own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from data.rows import read_rows
from tests.end_to_end.conftest import REPOSITORY

CODE = re.compile(r"```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def blocks(finished: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The page's blocks, the one that loads and the knob, in a folder where the finished sweep is called quickstart."""
    root = finished[0]
    (tmp_path / "mlruns/sweeps").mkdir(parents=True)
    (tmp_path / "mlruns/models").mkdir()
    (tmp_path / "mlruns/sweeps/quickstart").symlink_to(root / "sweeps/tiny")
    (model,) = (root / "models").glob("tiny-gemma2-*")
    (tmp_path / "mlruns/models/smollm2-135m-tiny").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    return CODE.findall((REPOSITORY / "docs/formats.md").read_text())


def test_files_load_by_hand(blocks: list[str]) -> None:
    names: dict[str, Any] = {}
    exec(compile(blocks[0], "docs/formats.md", "exec"), names)
    assert names["settings"]["name"] == "tiny"
    assert {"input", "target", "label"} <= set(names["rows"])
    assert {"input", "target", "generation"} <= set(names["texts"])
    raw = names["recovered"].query("condition == 'full' and subset == 'tool' and metric == 'mean_ce'")
    assert len(raw)
    assert names["ce"] > 0
    assert {"x", "change"} <= set(names["activations"])
    assert names["activations"]["x"].dtype == torch.bfloat16
    assert sorted(names["base"]) == ["W_dec", "W_enc", "b_dec", "b_enc", "threshold"]
    width = names["settings"]["deltas"]["d_new"][0] + 1
    assert {name: one.shape[-1] for name, one in names["delta"].items() if name != "W_dec"} == dict.fromkeys(
        ("W_enc", "b_enc", "threshold"), width
    )


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_the_knob_by_hand(finished: tuple[Path, Any], blocks: list[str], alpha: float) -> None:
    """Its cross-entropy is that of the dose-response table, on every subset."""
    root, code = finished[0], blocks[1]
    assert len(code.strip().splitlines()) < 40
    names: dict[str, Any] = {}
    exec(compile(code, "docs/formats.md", "exec"), names)
    names["alpha"] = alpha
    doses = pd.read_csv(root / "sweeps/tiny/report/exp2B_metrics.csv", dtype={"layer": str})
    doses = doses[(doses["condition"] == "alpha") & (doses["target"] == "change") & (doses["layer"] == "0-3")]
    doses = doses[doses["alpha"] == alpha].set_index("subset")
    tokenizer = names["tokenizer"]
    for subset, expected in doses["mean_ce"].items():
        nats = tokens = 0.0
        for row in read_rows(root / "sweeps/tiny/data/evaluation.jsonl"):
            if row.label != subset:
                continue
            prompt = [tokenizer.bos_token_id, *tokenizer(row.input + "\n", add_special_tokens=False)["input_ids"]]
            target = [*tokenizer(row.target, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
            with torch.no_grad():
                logits = names["model"](torch.tensor([prompt + target])).logits[0].log_softmax(-1)
            nats -= logits[len(prompt) - 1 : -1].gather(1, torch.tensor(target).unsqueeze(1)).sum().item()
            tokens += len(target)
        assert nats / tokens == pytest.approx(expected, rel=1e-4)

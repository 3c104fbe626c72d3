"""What the lora stage's worker makes of an adapter that was trained elsewhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModel, AutoModelForCausalLM

from data.rows import make_row, write_rows
from evaluators.splice.limits import Limits
from jobs.files import read_json
from jobs.sweep.finetuned import Task, merge_and_check, merge_check
from models.adapters import Attached

IDS = torch.arange(10, 130, 5).reshape(2, 12)


@pytest.fixture
def task(llama_folder: Path, tmp_path: Path) -> Task:
    rows = [make_row(f"Say {word} twice.", f"{word} {word}", "all") for word in ("one", "two", "three", "four", "five")]
    write_rows(tmp_path / "rows" / "validation.jsonl", rows)
    return Task(
        base=str(llama_folder),
        adapter=str(tmp_path / "adapter"),
        finetuned=str(tmp_path / "merged"),
        compares=True,
        rows=str(tmp_path / "rows"),
        answered="",
        validation=str(tmp_path / "validation.json"),
        key="a key",
        behaviours={"exact": "equals_target"},
        limits=Limits(8),
        device="cpu",
    )


def trained(model: Any, folder: str, *still: int, **settings: Any) -> None:
    """Saves an adapter with random values, but for layers `still`, where it has learned nothing."""
    adapted = get_peft_model(model, LoraConfig(r=2, **settings))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name and not any(f"layers.{layer}." in name for layer in still):
                parameter.normal_()
    adapted.save_pretrained(folder)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS).logits


def test_an_adapter_of_the_body_is_merged_into_the_body(task: Task, llama_folder: Path) -> None:
    """Its keys lack the causal LM's prefix; PEFT alone would warn, merge nothing and go on."""
    body = AutoModel.from_pretrained(llama_folder, dtype=torch.float32)
    trained(body, task.adapter, target_modules=["up_proj", "down_proj"], task_type="FEATURE_EXTRACTION")
    merge_and_check(task)
    expected = AutoModelForCausalLM.from_pretrained(llama_folder, dtype=torch.float32)
    PeftModel.from_pretrained(expected.model, task.adapter).merge_and_unload()
    merged = AutoModelForCausalLM.from_pretrained(task.finetuned, dtype=torch.float32)
    assert torch.equal(logits(merged), logits(expected))
    found = read_json(Path(task.validation))
    assert merge_check(found["merge"])["passed"]
    assert found["merge"]["modules"] == 6
    assert set(found["changed"]) == {
        f"model.layers.{layer}.mlp.{name}.weight" for layer in range(3) for name in ("up_proj", "down_proj")
    }


def test_modules_that_an_adapter_leaves_as_they_were_are_listed(task: Task, load: Any, llama_folder: Path) -> None:
    trained(load(llama_folder)[0], task.adapter, 1, target_modules=["up_proj", "v_proj"], task_type="CAUSAL_LM")
    merge_and_check(task)
    found = read_json(Path(task.validation))
    assert found["merge"]["unchanged"] == ["model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj"]
    assert not any("layers.1." in name for name in found["changed"])
    assert merge_check(found["merge"])["passed"]


def test_an_untrained_adapter_changes_nothing(task: Task, load: Any, llama_folder: Path) -> None:
    trained(load(llama_folder)[0], task.adapter, 0, 1, 2, target_modules=["up_proj"], task_type="CAUSAL_LM")
    merge_and_check(task)
    found = read_json(Path(task.validation))
    assert found["changed"] == []
    assert not merge_check(found["merge"])["passed"]


def test_a_merge_that_is_not_what_the_adapter_says_is_seen(
    task: Task, load: Any, llama_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(load(llama_folder)[0], task.adapter, target_modules=["up_proj"], task_type="CAUSAL_LM")
    right = Attached.fold_in

    def wrong(self: Attached) -> Any:
        model = right(self)
        with torch.no_grad():
            model.get_parameter("model.layers.1.mlp.up_proj.weight").mul_(1.1)
        return model

    monkeypatch.setattr(Attached, "fold_in", wrong)
    merge_and_check(task)
    assert not merge_check(read_json(Path(task.validation))["merge"])["passed"]

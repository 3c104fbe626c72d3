"""A LoRA trial whose worker is lost resumes in the same folder and ends with the same figures and adapter bytes."""

import pytest

from data.rows import Row, write_rows
from jobs.sweep.stages.lora import trial
from trainers.settings import LoraSettings

CALL = "<tool_call>calculator({})</tool_call>"
ROWS = [Row(f"What is {n} + 2?", CALL.format(f"{n} + 2"), "tool") for n in range(4)]
ROWS += [Row(f"Nine of {n} came.", f"Nine of {n} came.", "copy") for n in range(4)]


class Lost(Exception):
    pass


def config(folder, model, data):
    return {
        "model": str(model),
        "data": str(data),
        "folder": str(folder),
        "device": "cpu",
        "precision": "fp32",
        "threads": 1,
        "workers": 1,
        "checkpoint_seconds": 0.0,
        "settings": LoraSettings(steps=6, eval_every=2),
        "r": 2,
        "alpha_over_r": 2.0,
        "lr": 1e-2,
        "dropout": 0.1,
        "weight_decay": 0.0,
        "batch_size": 3,
    }


@pytest.fixture
def data(tmp_path):
    for name in ("train", "validation"):
        write_rows(tmp_path / f"{name}.jsonl", ROWS)
    return tmp_path


def lasting(figures):
    return {name: value for name, value in figures.items() if name != "tokens_per_second"}


@pytest.mark.parametrize("lost_at", [0, 1, 2])
def test_a_lost_worker_changes_nothing(gemma_folder, data, tmp_path, lost_at):
    expected, reports = [], []
    whole = trial(config(tmp_path / "whole", gemma_folder, data), expected.append)

    def report(figures):
        reports.append(figures)
        if len(reports) > lost_at:
            raise Lost

    with pytest.raises(Lost):
        trial(config(tmp_path / "lost", gemma_folder, data), report)
    again = []
    found = trial(config(tmp_path / "lost", gemma_folder, data), again.append)
    assert [lasting(one) for one in again] == [lasting(one) for one in expected]
    assert lasting(found) == lasting(whole)
    adapters = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("whole", "lost")]
    assert adapters[0].read_bytes() == adapters[1].read_bytes()
    assert not list(tmp_path.glob("*/checkpoint.safetensors*"))


def test_a_trial_that_cannot_continue_says_why(gemma_folder, data, tmp_path):
    found = trial({**config(tmp_path / "one", gemma_folder, data), "targets": "query"}, lambda figures: None)
    assert set(found) == {"failed"}
    assert found["failed"].startswith("lora.space.targets 'query' cannot be adapted")

"""Forecasts for GPUs that nothing has run on: a unit for each piece of work; an assumption moves what it should."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from transformers import Gemma2Config

from jobs.commands.assumed import Weights, assumed_loads, assumed_rows, memory_rows, weights_of
from jobs.commands.forecast import Load
from jobs.context.context import Context
from models.sources import load_model
from search_spaces.load import load
from sites import KINDS, Site, mlp_sites


def loads(root: Path, *settings: str, workers: int = 1) -> dict[str, Load]:
    context = Context(load("tiny", [f"storage.root={root}", "compute.gpus_per_trial=1", *settings]))
    return {one.stage: one for one in assumed_loads(context, workers)}


def test_weights_are_those_of_the_model(gemma_folder: Path) -> None:
    import torch

    model, _ = load_model(gemma_folder, torch.float32)
    every = sum(parameter.numel() for parameter in model.parameters())
    of_blocks = sum(parameter.numel() for name, parameter in model.named_parameters() if ".layers." in name)
    found = weights_of(gemma_folder)
    assert found == Weights(every, found.paths, every), "the embeddings are tied, so they multiply too"
    sites = [Site(layer, kind) for layer in range(4) for kind in KINDS.values()]
    assert found.on_paths(sites) == of_blocks, "each parameter of a block lies on one path"
    assert found.on_paths(mlp_sites([1])) > 3 * 32 * 32


def test_there_are_as_many_units_as_trials_layers_and_pieces(tmp_path: Path) -> None:
    found = loads(tmp_path)
    assert list(found) == ["lora", "transcoders", "capture", "deltas", "evaluate"]
    assert len(found["lora"].units) == 4
    assert len(found["transcoders"].units) == 2
    # As many trials as the finished sweep has, of which a group's two are random, and so side by side.
    assert len(found["deltas"].units) == 3 * 4 * 2 + 2 * 2 * 2
    assert len(loads(tmp_path, "deltas.side_by_side=1")["deltas"].units) == 2 * len(found["deltas"].units)
    assert len(loads(tmp_path, "deltas.trials=7")["deltas"].units) == 4 * len(found["deltas"].units)
    assert all(unit > 0 for load in found.values() for unit in load.units)


@pytest.mark.parametrize(
    ("setting", "moved"),
    [
        ("machine.tflops=1e-6", {"lora", "transcoders", "capture", "evaluate"}),
        ("machine.kernel_us=9.6", {"deltas"}),
        ("machine.layer_ms=2.2", {"evaluate"}),
        ("machine.start_s=1.0", {"lora", "deltas"}),
        ("lora.trials=5", {"lora"}),
    ],
)
def test_each_assumption_moves_its_stages_alone(tmp_path: Path, setting: str, moved: set[str]) -> None:
    before, after = loads(tmp_path), loads(tmp_path, setting)
    assert {name for name in before if sum(after[name].units) > sum(before[name].units)} == moved
    assert {name for name in before if after[name].units != before[name].units} == moved


def test_a_slow_storage_holds_every_worker_up(tmp_path: Path) -> None:
    slow = loads(tmp_path, "machine.disk_gbs=1e-6", workers=8)
    assert slow["capture"].span(8) == slow["capture"].alone + slow["capture"].shared
    assert slow["capture"].span(8) > 100 * loads(tmp_path, workers=8)["capture"].span(8)
    context = Context(load("tiny", [f"storage.root={tmp_path}", "machine.disk_gbs=1e-6"]))
    rows = dict(assumed_rows(context))
    assert "storage" in rows["on 64 GPUs"]
    assert "1e-06 GB/s of storage" in rows["assumed"]


GEMMA_2_9B = {
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 256,
    "vocab_size": 256000,
}
"""From its config.json."""


def test_nine_billion_parameters_in_bf16_fit_on_80_gb(tmp_path: Path, gemma_folder: Path) -> None:
    """With un-finetuned paths and change deltas of attention and MLPs in all layers, the exactness checks among it."""
    shutil.copytree(gemma_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    Gemma2Config(**GEMMA_2_9B).save_pretrained(tmp_path / "model")
    asked = [f"model.source={tmp_path / 'model'}", f"storage.root={tmp_path}", "compute.gpus_per_trial=1"]
    asked += ["deltas.targets=[change]", "deltas.d_new=[128]", "deltas.layers=all", "evaluate.controls=[]"]

    def memory(*settings: str) -> dict[str, float]:
        ((_, text),) = memory_rows(Context(load("tiny", [*asked, *settings])))
        found = {name: float(size) for name, size in re.findall(r"(\w+) ([\d.]+)", text)}
        return {**found, "evaluation": float(text.split()[0])}

    in_bf16, assumed = memory("model.dtype=bf16"), memory()
    model, mlps = 18.48, 2 * 42 * 3 * 3584 * 14336 / 1e9
    paths = mlps + 2 * 42 * 3584 * (16 + 2 * 8 + 16) * 256 / 1e9
    deltas = 42 * ((3584 + (16 + 2 * 8) * 256) + (16 * 256 + 3584) + 2 * 3584) * 128 * 4 / 1e9
    assert in_bf16["evaluation"] == pytest.approx(model + paths + deltas, rel=1e-2)
    assert in_bf16["checks"] == pytest.approx(model + 3 * paths + deltas, rel=1e-2)
    assert in_bf16["capture"] == pytest.approx(model + 4 * mlps, rel=1e-2), "linear changes are made of weights"
    assert max(in_bf16.values()) < 80
    assert assumed["evaluation"] == pytest.approx(2 * (model + paths) + deltas, rel=1e-2), "fp32, if nothing is asked"
    assert assumed["checks"] == pytest.approx(2 * (model + 3 * paths) + deltas, rel=1e-2)
    fitted = memory("model.dtype=bf16", "evaluate.controls=[pca_delta]")
    assert fitted["pca_delta"] == pytest.approx(model + 5 * paths + deltas, rel=1e-2)
    of_mlps = memory("model.dtype=bf16", "deltas.sites=[mlp]")
    assert of_mlps["evaluation"] == pytest.approx(model + mlps + 42 * 2 * 3584 * 128 * 4 / 1e9, rel=1e-2)

"""On a GPU every trainer and the evaluation compute what they compute on the CPU, and a run that was cut goes on."""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data.encoding import encode_row
from jobs.commands.device_checks import CHECKS, Check, examine
from jobs.commands.device_figures import ROWS, models, pairs, polish_subject
from models.sources import load_model
from tests.trainers.two_processes import check_two_are_one
from trainers.activations import Pairs
from trainers.checkpoints import Keeper
from trainers.delta_stack import Stack
from trainers.delta_transcoder import DeltaSettings, TrainedDelta, train_delta, train_deltas
from trainers.joint_polish import PolishSettings, polish
from trainers.lora import LoraSettings, Splits, train_lora
from trainers.precision import number_format

SETTINGS = DeltaSettings(d_new=16, lr=1e-2, sparsity=1e-4, epochs=3, batch_size=200, replicas=2, patience=99)


class Cut(Exception):
    """Stands for a kill."""


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_a_check_agrees_with_the_cpu(device: str, check: Check) -> None:
    findings = list(examine(device, [check]))
    assert {one.precision for one in findings} == set(check.formats)
    for one in findings:
        print(f"{one.check:30} {one.precision} {one.difference:.2e}")
    assert all(one.agrees for one in findings), findings


def test_a_check_notices_a_device_that_computes_something_else(device: str) -> None:
    def figures(scratch: Path, where: str, precision: str) -> torch.Tensor:
        return torch.ones(3) if where == "cpu" else torch.tensor([1.0, 1.0, 1.0 + 1e-3])

    (found,) = examine(device, [Check("wrong", figures)])
    assert not found.agrees
    assert found.difference == pytest.approx(1e-3 / 3**0.5, rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_a_cut_delta_run_ends_as_if_it_had_not_been(device: str, tmp_path: Path, precision: str) -> None:
    settings = replace(SETTINGS, precision=precision)
    whole = train_delta(pairs(), settings, device=device)
    keeper = Keeper(tmp_path / "kept.safetensors", seconds=0.0)
    steps = 0

    def cut(losses: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 40:
            raise Cut

    with pytest.raises(Cut):
        train_delta(pairs(), settings, device=device, keeper=keeper, on_step=cut)
    reports: list[dict] = []
    again = train_delta(pairs(), settings, device=device, keeper=keeper, report=reports.append)
    assert again.figures == whole.figures
    for one, other in zip(again.deltas, whole.deltas, strict=True):
        assert torch.equal(one.W_dec, other.W_dec)


def test_a_step_never_waits_for_the_device(device: str) -> None:
    """Neither as it is, nor as it is recorded or replayed."""
    run = Stack(pairs(), [SETTINGS], device)
    torch.cuda.synchronize()
    with number_format(device, "fp32") as dtype:
        for count, (x, residual) in enumerate(run.batches()):
            torch.cuda.set_sync_debug_mode("error")
            try:
                run.step(run.cast("x", x, dtype), run.cast("residual", residual, dtype))
            finally:
                torch.cuda.set_sync_debug_mode("default")
            if count == 5:
                break
    assert run.update.graph is not None


def test_replayed_steps_are_the_steps_as_they_are(device: str) -> None:
    def losses(recorded: bool) -> torch.Tensor:
        run, found = Stack(pairs(), [SETTINGS], device), []
        for x, residual in run.batches():
            if not recorded:
                run.update.called = 0  # the first call is never a replay
            one = run.step(run.cast("x", x, torch.float32), run.cast("residual", residual, torch.float32))
            found.append((one.error + one.penalty).clone())
        assert (run.update.graph is not None) == recorded
        return torch.stack(found)

    assert torch.equal(losses(True), losses(False))


def test_a_cut_lora_run_ends_as_if_it_had_not_been(device: str, tmp_path: Path) -> None:
    folder = models(tmp_path)["gemma"]
    settings = LoraSettings(r=4, lr=3e-3, batch_size=3, steps=8, eval_every=2, seed=1, dropout=0.1)

    def train(keeper: Keeper | None = None, cut_at: int | None = None) -> list[dict]:
        found: list[dict] = []

        def report(figures: dict) -> None:
            found.append({name: figures[name] for name in ("step", "val_loss", "train_loss")})
            if figures["step"] == cut_at:
                raise Cut

        model, tokenizer = load_model(folder, torch.float32, device)
        train_lora(model, tokenizer, Splits(ROWS, ROWS), settings, report, lambda adapted: None, keeper)
        return found

    whole = train()
    keeper = Keeper(tmp_path / "kept.safetensors", seconds=0.0)
    with pytest.raises(Cut):
        train(keeper, cut_at=6)
    assert train(keeper) == whole


def test_a_cut_polish_ends_as_if_it_had_not_been(device: str, tmp_path: Path) -> None:
    settings = PolishSettings(steps=12, lr=1e-3, rows=3)

    def train(keeper: Keeper | None = None, cut_at: int | None = None) -> list[dict]:
        def report(figures: dict) -> None:
            if figures["step"] == cut_at:
                raise Cut

        subject = polish_subject(tmp_path, device, "fp32")
        encoded = [encode_row(subject.bridge.tokenizer, row) for row in ROWS]
        history = polish(subject, encoded, encoded, settings, report=report, keeper=keeper).history
        return [{name: one[name] for name in ("step", "val_kl", "val_l0")} for one in history]

    whole = train()
    keeper = Keeper(tmp_path / "kept.safetensors", seconds=0.0)
    with pytest.raises(Cut):
        train(keeper, cut_at=8)
    assert train(keeper) == whole


def test_memory_is_given_back_after_a_trial(device: str) -> None:
    def left() -> int:
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    train_delta(pairs(), replace(SETTINGS, epochs=1), device=device)  # what libraries keep for themselves
    before = left()
    for _ in range(3):
        train_delta(pairs(), SETTINGS, device=device)
    assert left() <= before


def test_pairs_that_do_not_fit_on_the_device_train_the_same_from_pinned_memory(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = pairs()
    parts = [part for x, change in data.train.shards for part in zip(x.chunk(3), change.chunk(3), strict=True)]
    data = data._replace(train=Pairs(parts))  # more than one group of them
    expected = train_delta(data, SETTINGS, device=device)
    there = data.train.near(device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 0))
    assert there.near(device) is there
    assert all(one.is_pinned() for shard in data.train.near(device).shards for one in shard)
    found = train_delta(data, SETTINGS, device=device)
    assert found.figures == expected.figures
    for one, other in zip(found.deltas, expected.deltas, strict=True):
        assert torch.equal(one.W_dec, other.W_dec)


def test_runs_side_by_side_are_those_of_the_cpu(device: str) -> None:
    asked = [replace(SETTINGS, lr=lr, sparsity=sparsity) for lr, sparsity in ((1e-2, 1e-4), (3e-3, 1e-2))]
    found, expected = (train_deltas(pairs(), asked, device=where) for where in (device, "cpu"))
    for one, other in zip(found, expected, strict=True):
        assert isinstance(one, TrainedDelta)
        assert isinstance(other, TrainedDelta)
        for name in ("val_loss", "val_l0_delta"):
            assert one.figures[name] == pytest.approx(other.figures[name], rel=1e-3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_processes_on_two_devices_are_one(tmp_path: Path) -> None:
    check_two_are_one(tmp_path, "cuda")

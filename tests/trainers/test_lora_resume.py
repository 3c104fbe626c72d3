"""A LoRA run interrupted anywhere and resumed is the run that never was; patience and epochs end a run."""

import dataclasses

import pytest
import torch

from data.rows import Row
from trainers import lora
from trainers.checkpoints import Keeper
from trainers.errors import TrainingError
from trainers.lora import LoraSettings, Splits, train_lora

CALL = "<tool_call>calculator({})</tool_call>"
ROWS = [Row(f"What is {n} + 2?", CALL.format(f"{n} + 2"), "tool") for n in (1, 22, 333)]
ROWS += [Row("Nine of 12 came.", "Nine of 12 came.", "copy"), Row("In 1987, on page 4.", "In 1987, on page 4.", "copy")]
SETTINGS = LoraSettings(r=2, lr=1e-2, dropout=0.1, batch_size=2, steps=7, eval_every=3, schedule="cosine", seed=1)


class Killed(Exception):
    pass


def train(load, folder, settings=SETTINGS, keeper=None, kill_before=None):
    """The reports without the clock, and the bytes of every adapter kept."""
    model, tokenizer = load(folder)
    reports, kept = [], []

    def keep(adapted):
        kept.append({name: p.detach().clone() for name, p in adapted.named_parameters() if "lora_" in name})

    class Run(lora._Run):
        def step(self, rows):
            if self.at == kill_before:
                raise Killed
            super().step(rows)

    original, lora._Run = lora._Run, Run
    try:
        train_lora(model, tokenizer, Splits(ROWS, ROWS), settings, reports.append, keep, keeper)
    finally:
        lora._Run = original
    return [{key: value for key, value in one.items() if key != "tokens_per_second"} for one in reports], kept


@pytest.mark.parametrize("kill_before", [1, 3, 4, 6])
def test_interrupted_and_resumed_is_never_interrupted(load, gemma_folder, tmp_path, kill_before):
    expected, adapters = train(load, gemma_folder)
    keeper = Keeper(tmp_path / "checkpoint.safetensors", seconds=0.0)
    with pytest.raises(Killed):
        train(load, gemma_folder, keeper=keeper, kill_before=kill_before)
    torch.manual_seed(99)
    torch.rand(5)
    found, again = train(load, gemma_folder, keeper=Keeper(keeper.path, seconds=0.0))
    assert found == expected
    assert all(torch.equal(again[-1][name], one) for name, one in adapters[-1].items())


def test_a_checkpoint_of_other_settings_is_not_taken_up(load, gemma_folder, tmp_path):
    keeper = Keeper(tmp_path / "checkpoint.safetensors", seconds=0.0)
    train(load, gemma_folder, keeper=keeper)
    other = dataclasses.replace(SETTINGS, lr=2e-3)
    expected, _ = train(load, gemma_folder, other)
    assert train(load, gemma_folder, other, keeper=keeper)[0] == expected


def test_a_checkpoint_holds_no_pickle(load, gemma_folder, tmp_path):
    keeper = Keeper(tmp_path / "checkpoint.safetensors", seconds=0.0)
    train(load, gemma_folder, keeper=keeper)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.safetensors"]
    length = int.from_bytes(keeper.path.read_bytes()[:8], "little")
    assert keeper.path.read_bytes()[8 : 8 + length].startswith(b"{")


def test_patience_ends_a_run_that_no_longer_improves(load, gemma_folder):
    """At a huge learning rate the loss soon rises: the run ends `patience` validations after its best."""
    settings = dataclasses.replace(SETTINGS, lr=0.5, steps=60, eval_every=1, patience=3, schedule="constant")
    reports, kept = train(load, gemma_folder, settings)
    losses = [one["val_loss"] for one in reports]
    best = losses.index(min(losses))
    assert len(losses) == best + 1 + 3 < 60
    assert len(kept) == len({min(losses[: n + 1]) for n in range(len(losses))})


def test_epochs_stand_in_for_steps(load, gemma_folder):
    reports, _ = train(load, gemma_folder, dataclasses.replace(SETTINGS, epochs=2, eval_every=100))
    assert [one["step"] for one in reports] == [6], "two passes of three batches over five rows"


def test_a_row_beyond_the_context_is_named(load, gemma_folder):
    model, tokenizer = load(gemma_folder)
    model.config.max_position_embeddings = 40
    with pytest.raises(TrainingError, match=r"a row has \d+ tokens, but the model's context holds 40: .*'What is 333"):
        train_lora(model, tokenizer, Splits(ROWS, ROWS[:1]), SETTINGS, lambda figures: None, lambda adapted: None)


def test_a_tokenizer_without_eos_is_said(load, gemma_folder):
    model, tokenizer = load(gemma_folder)
    tokenizer.eos_token = None
    with pytest.raises(TrainingError, match="no EOS token"):
        train_lora(model, tokenizer, Splits(ROWS, ROWS), SETTINGS, lambda figures: None, lambda adapted: None)


def test_memory_that_runs_out_is_a_sentence_with_what_to_change(load, gemma_folder):
    model, tokenizer = load(gemma_folder)

    def report(figures):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")

    with pytest.raises(TrainingError, match=r"out of memory with batch_size 2.*lora\.accumulate"):
        train_lora(model, tokenizer, Splits(ROWS, ROWS), SETTINGS, report, lambda adapted: None)

"""LoRA: the loss is on target tokens alone, padding changes nothing, the merged model is the adapted one."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from data.encoding import encode_row
from data.rows import Row
from models.adapters import attach
from models.errors import ModelError
from trainers import lora
from trainers.adapters import PlainForward, add_adapter
from trainers.errors import DivergedError, TrainingError
from trainers.lora import LoraSettings, Splits, figures_of, train_lora, validation_counts
from trainers.lora_forward import cross_entropy_sum
from trainers.packing import example, pack

CALL = "<tool_call>calculator({})</tool_call>"
TOOL = [Row(f"What is {n} + 2?", CALL.format(f"{n} + 2"), "tool") for n in (1, 22, 333)]
COPY = [Row("Nine of 12 came.", "Nine of 12 came.", "copy"), Row("In 1987, on page 4.", "In 1987, on page 4.", "copy")]
ROWS = [*TOOL, *COPY]
SETTINGS = LoraSettings(r=2, lr=3e-3, batch_size=3, steps=6, eval_every=4, seed=1)


def loss_of(model, tokenizer, rows, loss_on="target"):
    batch = pack([example(tokenizer, row, loss_on) for row in rows])
    with torch.no_grad():
        return cross_entropy_sum(PlainForward(model)(batch), batch.labels).item()


def plain_nll(model, tokenizer, row, everything=False):
    """Summed cross-entropy of one row alone, from every logit of the plain model, one token after the other."""
    encoded = encode_row(tokenizer, row)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([encoded.ids])).logits[0].float()
    first = 1 if everything else len(encoded.prompt)
    total = 0.0
    for position in range(first, len(encoded.ids)):
        total -= logits[position - 1].log_softmax(-1)[encoded.ids[position]].item()
    return total, len(encoded.ids) - first


def train(load, folder, settings=SETTINGS, rows=ROWS):
    model, tokenizer = load(folder)
    reports, kept = [], []
    train_lora(model, tokenizer, Splits(rows, ROWS), settings, reports.append, lambda adapted: kept.append(adapted))
    return reports, kept


def test_the_loss_is_the_plain_cross_entropy_of_targets_and_eos(model_folder, load):
    model, tokenizer = load(model_folder)
    found = loss_of(model, tokenizer, ROWS)
    assert found == pytest.approx(sum(plain_nll(model, tokenizer, row)[0] for row in ROWS), rel=1e-5)


def test_everything_means_all_of_copy_rows_and_still_the_target_of_requests(load, gemma_folder):
    model, tokenizer = load(gemma_folder)
    found = loss_of(model, tokenizer, ROWS, "everything")
    expected = [plain_nll(model, tokenizer, row, everything=row.label == "copy") for row in ROWS]
    assert found == pytest.approx(sum(nll for nll, _ in expected), rel=1e-5)
    counts = [example(tokenizer, row, "everything").labelled for row in ROWS]
    assert counts == [count for _, count in expected]


def test_the_side_and_amount_of_padding_change_no_loss(model_folder, load):
    """Right padding by hand on the plain model gives the loss that left padding gives here."""
    model, tokenizer = load(model_folder)
    rows = [encode_row(tokenizer, row) for row in ROWS]
    longest = max(len(row.ids) for row in rows) + 5
    ids = torch.tensor([row.ids + [tokenizer.pad_token_id] * (longest - len(row.ids)) for row in rows])
    mask = torch.tensor([[1] * len(row.ids) + [0] * (longest - len(row.ids)) for row in rows])
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        labels[index, len(row.prompt) : len(row.ids)] = torch.tensor(row.target)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        right = functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
    left = loss_of(model, tokenizer, ROWS)
    assert left == pytest.approx(right, rel=1e-5)


def test_validation_is_nats_a_target_token_whatever_the_batch(load, gemma_folder):
    model, tokenizer = load(gemma_folder)
    rows = [encode_row(tokenizer, row) for row in ROWS]
    expected = [plain_nll(model, tokenizer, row) for row in ROWS]
    mean = sum(nll for nll, _ in expected) / sum(count for _, count in expected)
    for size in (1, 2, 16):
        figures = figures_of(validation_counts(PlainForward(model), rows, "cpu", batch_size=size))
        assert figures["val_loss"] == pytest.approx(mean, rel=1e-5)


def oracle(says: dict[int, int], vocabulary: int):
    """Says one token all along a row; rows are told apart by their length, of which a batch lacks the last token."""

    def forward(batch):
        count, longest = batch.rows.shape
        lengths = torch.bincount(batch.places // longest, minlength=count)
        logits = torch.zeros(len(batch.scored), vocabulary)
        for place, row in enumerate((batch.places[batch.scored] // longest).tolist()):
            logits[place, says[lengths[row].item() + 1]] = 1.0
        return logits

    return forward


def test_accuracy_of_the_first_token_and_of_all(load, gemma_folder):
    """The first token of three of five rows is right; of the others, those that happen to be the token said first."""
    _, tokenizer = load(gemma_folder)
    (other,) = tokenizer("x", add_special_tokens=False)["input_ids"]
    rows = [encode_row(tokenizer, row) for row in ROWS]
    said = [row.target[0] if right else other for row, right in zip(rows, (1, 1, 0, 1, 0), strict=True)]
    assert all(row.target[0] != other for row, right in zip(rows, (1, 1, 0, 1, 0), strict=True) if not right)
    says = {len(row.ids): token for row, token in zip(rows, said, strict=True)}
    assert len(says) == len(rows)
    figures = figures_of(validation_counts(oracle(says, len(tokenizer)), rows, "cpu", batch_size=2))
    assert figures["first_token_accuracy"] == pytest.approx(3 / 5)
    assert 0 < figures["token_accuracy"] < 3 / 5
    everything = sum(len(row.target) for row in rows)
    assert (figures["token_accuracy"] * everything) == pytest.approx(round(figures["token_accuracy"] * everything))


def test_training_lowers_the_loss_and_reports_it(load, gemma_folder):
    settings = dataclasses.replace(SETTINGS, steps=20, eval_every=8, lr=2e-2)
    reports, kept = train(load, gemma_folder, settings)
    assert [figures["step"] for figures in reports] == [8, 16, 20]
    assert reports[-1]["val_loss"] < reports[0]["val_loss"]
    assert reports[-1]["train_loss"] < reports[0]["train_loss"]
    _, tokenizer = load(gemma_folder)
    lengths = sum(len(encode_row(tokenizer, row).ids) for row in ROWS)
    assert reports[-1]["tokens"] == 10 * lengths, "20 batches of 3 and 2 rows are ten epochs of five"
    best = [min(one["val_loss"] for one in reports[: n + 1]) for n in range(3)]
    assert len(kept) == len(set(best)), "kept at every validation that beats all before"


def test_the_first_reported_train_loss_is_the_untrained_models(load, gemma_folder):
    settings = dataclasses.replace(SETTINGS, batch_size=5, steps=1)
    reports, _ = train(load, gemma_folder, settings)
    model, tokenizer = load(gemma_folder)
    expected = [plain_nll(model, tokenizer, row) for row in ROWS]
    mean = sum(nll for nll, _ in expected) / sum(count for _, count in expected)
    assert reports[0]["train_loss"] == pytest.approx(mean, rel=1e-4)


def test_a_seed_gives_one_adapter(load, gemma_folder):
    runs = {}
    for noise, (name, seed) in enumerate({"first": 1, "again": 1, "other": 2}.items()):
        torch.manual_seed(noise)
        _, kept = train(load, gemma_folder, dataclasses.replace(SETTINGS, seed=seed, dropout=0.1))
        runs[name] = {key: p.detach().clone() for key, p in kept[-1].named_parameters() if "lora_" in key}
    assert all(torch.equal(one, runs["again"][key]) for key, one in runs["first"].items())
    assert any(not torch.equal(one, runs["other"][key]) for key, one in runs["first"].items())


def test_only_the_adapter_is_trained(load, gemma_folder):
    _, kept = train(load, gemma_folder)
    base, _ = load(gemma_folder)
    before = dict(base.named_parameters())
    after = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): parameter
        for name, parameter in kept[-1].named_parameters()
        if "lora_" not in name
    }
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_merged_is_adapter_on_base(model_folder, load, tmp_path):
    _, kept = train(load, model_folder, dataclasses.replace(SETTINGS, lr=2e-2))
    adapted = kept[-1].eval()
    adapted.save_pretrained(tmp_path / "adapter")
    base, tokenizer = load(model_folder)
    merged = attach(base, tmp_path / "adapter").fold_in()
    ids = torch.tensor([encode_row(tokenizer, Row("What is 8 + 9?", "x", "")).ids])
    plain, _ = load(model_folder)
    with torch.no_grad():
        expected, found, untouched = (one(input_ids=ids).logits for one in (adapted, merged, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert (found - untouched).abs().max() > 1e-2
    assert type(merged) is type(plain)

    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    again, _ = load(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(again(input_ids=ids).logits, found, rtol=0, atol=0)
    tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert tied == plain.config.tie_word_embeddings
    assert torch.equal(again.model.embed_tokens.weight, plain.model.embed_tokens.weight)


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        ("query", "allowed: all-linear, or some of down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj"),
        ("input_layernorm", "cannot be adapted"),
        ("lm_head", "ties its embeddings"),
        ("q_proj, embed_tokens", "ties its embeddings"),
    ],
)
def test_bad_targets_are_one_sentence(load, gemma_folder, targets, said):
    model, _ = load(gemma_folder)
    with pytest.raises(TrainingError) as raised:
        add_adapter(model, targets)
    assert str(raised.value).startswith(f"lora.space.targets {targets!r} ")
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_targets_and_scale_reach_the_adapter(load, gemma_folder):
    model, _ = load(gemma_folder)
    adapted = add_adapter(model, "q_proj, v_proj", r=4, alpha=12.0)
    adapted_modules = {name.split(".")[-4] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert adapted_modules == {"q_proj", "v_proj"}
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 3.0
    assert layer.lora_A["default"].weight.shape[0] == 4


def test_a_loss_that_is_not_finite_is_said(load, gemma_folder):
    model, tokenizer = load(gemma_folder)
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(DivergedError, match=r"the training loss is nan at step 1 \(lr 0\.003\)"):
        train_lora(model, tokenizer, Splits(ROWS, ROWS), SETTINGS, lambda figures: None, lambda adapted: None)


def test_an_adapter_that_is_not_there_is_one_sentence(load, gemma_folder, tmp_path):
    model, _ = load(gemma_folder)
    with pytest.raises(ModelError, match=r"has no adapter_model\.safetensors"):
        attach(model, tmp_path)


def test_an_adapter_of_another_model_is_one_sentence(load, gemma_folder, llama_folder, tmp_path):
    _, kept = train(load, llama_folder, dataclasses.replace(SETTINGS, steps=1))
    kept[-1].save_pretrained(tmp_path)
    model, _ = load(gemma_folder)
    with pytest.raises(ModelError, match="it is for another model"):
        attach(model, tmp_path)


SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from data.rows import Row
from models.sources import load_model
from trainers.lora import LoraSettings, Splits, train_lora
rows = [Row(*row) for row in json.loads(sys.argv[2])]
model, tokenizer = load_model(Path(sys.argv[1]), torch.float32)
reports = []
settings = LoraSettings(**json.loads(sys.argv[3]))
train_lora(model, tokenizer, Splits(rows, rows), settings, reports.append, lambda adapted: None)
Path(sys.argv[4], os.environ["RANK"]).write_text(json.dumps(reports))
torch.distributed.barrier()
torch.distributed.destroy_process_group()  # left to the end of Python, gloo's threads abort the process now and then
"""


def test_two_processes_train_as_one(load, gemma_folder, tmp_path):
    """Each takes its share of a batch, one row where the batch is odd and none where it is short; both say the same."""
    settings = dataclasses.replace(SETTINGS, batch_size=2, steps=3, eval_every=1, lr=1e-2)
    expected, _ = train(load, gemma_folder, settings)
    (tmp_path / "script.py").write_text(SCRIPT)
    rows = json.dumps([[row.input, row.target, row.label] for row in ROWS])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [str(tmp_path / "script.py"), str(gemma_folder), rows, json.dumps(vars(settings)), str(tmp_path)]
    root = Path(lora.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in ("0", "1"):
        for one, other in zip(json.loads((tmp_path / rank).read_text()), expected, strict=True):
            assert one["tokens"] == other["tokens"]
            assert one["train_loss"] == pytest.approx(other["train_loss"], rel=1e-4)
            assert one["val_loss"] == pytest.approx(other["val_loss"], rel=1e-4)

"""The fused pass against plain PEFT: same logits, same gradients, same adapter, in whatever way rows are packed."""

import dataclasses

import pytest
import torch
from torch.nn import functional
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from data.rows import Row
from models.tiny import byte_tokenizer
from trainers import lora, lora_forward
from trainers.adapters import PlainForward, add_adapter, forward_of
from trainers.lora import LoraSettings, Splits, train_lora
from trainers.lora_forward import LONGEST_ROW, FusedForward, cross_entropy_sum
from trainers.packing import example, pack

CALL = "<tool_call>calculator({})</tool_call>"
ROWS = [
    Row("What is 1 + 2?", CALL.format("1 + 2"), "tool"),
    Row("In 1987, on page 4.", "In 1987, on page 4.", "copy"),
    Row("Nine of 12 came.", "Nine of 12 came, and then some more than ever came before.", "copy"),  # beyond the window
]


@pytest.fixture(scope="session", params=["gemma2", "gemma3", "llama"])
def folder(request, gemma_folder, llama_folder, tmp_path_factory):
    """A random model of each architecture that is fused."""
    if request.param != "gemma3":
        return gemma_folder if request.param == "gemma2" else llama_folder
    return tiny_gemma3(tmp_path_factory.mktemp("gemma3"))


def tiny_gemma3(folder):
    """Heads have norms of their own, and windowed layers another rotary base than the others."""
    tokenizer = byte_tokenizer()
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=16,
        sliding_window=48,
        layer_types=["sliding_attention", "full_attention"] * 2,
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0},
        },
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5 if "norm" in name else 5 * parameter)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def adapted_model(load, folder, targets="all-linear", dtype=torch.float32, dropout=0.0):
    """An adapter whose B is not zero, so that every product matters."""
    model, tokenizer = load(folder, dtype)
    torch.manual_seed(3)
    adapted = add_adapter(model, targets, r=3, alpha=6.0, dropout=dropout)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)
    return adapted, pack([example(tokenizer, row) for row in ROWS])


def asked_of(batch, number):
    """Which of the tokens asked are of row `number`."""
    return batch.places[batch.scored] // batch.rows.shape[1] == number


def gradients_of(adapted, forward, batch):
    adapted.zero_grad()
    loss = functional.cross_entropy(forward(batch), batch.labels, reduction="sum")
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in adapted.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("targets", ["all-linear", "q_proj, v_proj", "up_proj, o_proj"])
def test_logits_and_gradients_are_those_of_plain_peft(load, folder, targets):
    adapted, batch = adapted_model(load, folder, targets)
    assert isinstance(forward_of(adapted, LONGEST_ROW), FusedForward)
    with torch.no_grad():
        torch.testing.assert_close(FusedForward(adapted)(batch), PlainForward(adapted)(batch), rtol=1e-4, atol=1e-4)
    expected, plain = gradients_of(adapted, PlainForward(adapted), batch)
    found, fused = gradients_of(adapted, FusedForward(adapted), batch)
    assert found == pytest.approx(expected, rel=1e-5)
    assert plain.keys() == fused.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(fused[name], gradient, rtol=1e-3, atol=1e-4 * gradient.abs().max().item(), msg=name)


def test_a_row_sees_itself_alone(load, folder):
    adapted, batch = adapted_model(load, folder)
    forward = FusedForward(adapted)
    alone = pack([example(load(folder)[1], ROWS[1])])
    with torch.no_grad():
        torch.testing.assert_close(forward(batch)[asked_of(batch, 1)], forward(alone), rtol=1e-4, atol=1e-4)


def test_checkpointing_changes_no_gradient(load, gemma_folder):
    adapted, batch = adapted_model(load, gemma_folder)
    _, plain = gradients_of(adapted, FusedForward(adapted), batch)
    _, again = gradients_of(adapted, FusedForward(adapted, checkpointing=True), batch)
    assert all(torch.equal(again[name], gradient) for name, gradient in plain.items())


def test_bf16_gradients_are_no_farther_from_fp32_than_plain_pefts(load, llama_folder):
    exact, batch = adapted_model(load, llama_folder)
    _, expected = gradients_of(exact, PlainForward(exact), batch)
    adapted, _ = adapted_model(load, llama_folder, dtype=torch.bfloat16)
    _, plain = gradients_of(adapted, PlainForward(adapted), batch)
    _, fused = gradients_of(adapted, FusedForward(adapted), batch)

    def distance(found):
        squares = sum((found[name] - one).square().sum() for name, one in expected.items())
        return (squares / sum(one.square().sum() for one in expected.values())).sqrt().item()

    assert distance(fused) < 1.5 * distance(plain) + 1e-3


def test_dropout_leaves_the_mean_and_draws_for_each_adapter(load, llama_folder):
    adapted, _ = adapted_model(load, llama_folder, "v_proj, q_proj", dropout=0.3)
    group = FusedForward(adapted).blocks[0].qkv
    group.refresh(torch.float32)
    x = torch.randn(1, 24).expand(4000, 24)
    with torch.no_grad():
        adapted.eval()
        expected = group(x)
        adapted.train()
        drawn = group(x)
    for which, (one, other) in enumerate(zip(drawn, expected, strict=True)):
        spread = one.std(0)
        assert ((one.mean(0) - other[0]).abs() <= 5 * spread / 4000**0.5 + 1e-5).all()
        assert (spread > 0).all() == (which != 1), "k_proj has no adapter to drop for"
    correlation = torch.corrcoef(torch.stack([drawn[0][:, 0], drawn[2][:, 0]]))[0, 1]
    assert correlation.abs() < 0.1


def test_gradients_go_through_the_dropout_that_was_drawn(load, llama_folder):
    adapted, batch = adapted_model(load, llama_folder, "v_proj, q_proj", dropout=0.3)
    adapted.train()
    forward = FusedForward(adapted)

    def loss():
        torch.manual_seed(5)
        with torch.no_grad():
            return functional.cross_entropy(forward(batch).double(), batch.labels, reduction="sum").item()

    torch.manual_seed(5)
    _, gradients = gradients_of(adapted, forward, batch)
    weights = {name: p for name, p in adapted.named_parameters() if name in gradients}
    directions = {name: gradient / gradient.norm() for name, gradient in gradients.items()}

    def move(distance):
        for name, weight in weights.items():
            weight.data.add_(directions[name], alpha=distance)

    move(1e-3)
    above = loss()
    move(-2e-3)
    slope = (above - loss()) / 2e-3
    assert slope == pytest.approx(sum(gradient.norm().item() for gradient in gradients.values()), rel=0.02)


@pytest.mark.parametrize("at_once", [1, 120, 2**20])
@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-6), (torch.bfloat16, 2**-8)])
def test_the_cross_entropy_is_the_librarys_with_its_gradient(monkeypatch, at_once, dtype, close):
    monkeypatch.setattr(lora_forward, "CROSS_ENTROPY_NUMBERS", (at_once, at_once))
    torch.manual_seed(0)
    logits = (5 * torch.randn(7, 50)).to(dtype)
    logits[2] += 1000  # whose exponentials are beyond fp32
    labels = torch.randint(50, (7,))
    exact = logits.double().requires_grad_()
    expected = functional.cross_entropy(exact, labels, reduction="sum") / 3
    (2.0 * expected).backward()
    again = logits.requires_grad_()
    found = cross_entropy_sum(1.0 * again, labels, 3)
    (2.0 * found).backward()
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(again.grad.double(), exact.grad, rtol=close, atol=1e-6)
    with torch.no_grad():
        assert cross_entropy_sum(logits.detach().clone(), labels).item() == pytest.approx(3 * found.item(), rel=1e-6)


def test_training_gives_the_adapter_that_plain_peft_gives(load, model_folder, monkeypatch):
    settings = LoraSettings(r=2, lr=1e-2, batch_size=2, steps=6, eval_every=3, seed=1)
    losses, adapters = [], []
    for plain in (True, False):
        with monkeypatch.context() as patch:
            if plain:
                patch.setattr(lora, "forward_of", lambda adapted, *_: PlainForward(adapted))
            model, tokenizer = load(model_folder)
            reports, kept = [], []
            train_lora(model, tokenizer, Splits(ROWS, ROWS), settings, reports.append, kept.append)
        losses.append([(one["train_loss"], one["val_loss"], one["token_accuracy"]) for one in reports])
        adapters.append({name: p.detach() for name, p in kept[-1].named_parameters() if "lora_" in name})
    assert losses[1] == [pytest.approx(one, rel=1e-4) for one in losses[0]]
    for name, one in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], one, rtol=1e-2, atol=2e-4, msg=name)


def test_what_the_fused_pass_does_not_compute_is_left_to_the_model(load, llama_folder):
    model, _ = load(llama_folder)
    adapted = add_adapter(model, "q_proj")
    assert isinstance(forward_of(adapted, LONGEST_ROW), FusedForward)
    assert isinstance(forward_of(adapted, LONGEST_ROW + 1), PlainForward)
    adapted.config.model_type = "phi"
    assert isinstance(forward_of(adapted, 10), PlainForward)
    model, _ = load(llama_folder)
    assert isinstance(forward_of(add_adapter(model, "q_proj, lm_head"), 10), PlainForward)


@pytest.mark.parametrize("change", [{"accumulate": 2}, {"accumulate": 7}, {"gradient_checkpointing": True}])
def test_less_memory_is_the_same_training(load, gemma_folder, change):
    settings = LoraSettings(r=2, lr=1e-2, batch_size=3, steps=3, eval_every=1)
    reports = {}
    for name, one in {"plain": settings, "changed": dataclasses.replace(settings, **change)}.items():
        model, tokenizer = load(gemma_folder)
        reports[name] = []
        train_lora(model, tokenizer, Splits(ROWS, ROWS), one, reports[name].append, lambda adapted: None)
    for one, other in zip(reports["plain"], reports["changed"], strict=True):
        assert other["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
        assert other["val_loss"] == pytest.approx(one["val_loss"], rel=1e-5)

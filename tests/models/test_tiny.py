"""The tiny Gemma-2: the same weights for a seed, the norms that make Gemma-2 hard, a tokenizer for any text."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from data.encoding import encode_row, encode_text
from data.rows import Row
from models.tiny import SPECIALS, build_tiny_gemma2, byte_tokenizer

TOKENIZER = byte_tokenizer()


def test_a_seed_gives_one_model(tmp_path, gemma_folder):
    torch.manual_seed(99)  # the caller's generator neither shapes the weights nor is used up by them
    before = torch.get_rng_state()
    build_tiny_gemma2(tmp_path / "again", seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    build_tiny_gemma2(tmp_path / "other", seed=1)
    first, again, other = (
        load_file(folder / "model.safetensors") for folder in (gemma_folder, tmp_path / "again", tmp_path / "other")
    )
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_norm_gains_are_far_from_one_and_embeddings_are_tied(gemma_folder, load):
    model, _ = load(gemma_folder)
    gains = [1 + p for name, p in model.named_parameters() if name.endswith("feedforward_layernorm.weight")]
    assert len(gains) == 2 * model.config.num_hidden_layers
    assert all((gain - 1).abs().mean() > 0.2 for gain in gains)
    assert model.lm_head.weight is model.model.embed_tokens.weight


@given(st.text())
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(text):
    ids = encode_text(TOKENIZER, text)
    assert ids[0] == TOKENIZER.bos_token_id
    assert TOKENIZER.decode(ids[1:], skip_special_tokens=True, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("special", SPECIALS)
def test_a_text_cannot_spell_a_special_token(special):
    row = encode_row(TOKENIZER, Row(f"say {special}", f"{special} ok", ""))
    specials = set(TOKENIZER.all_special_ids)
    assert row.prompt[0] == TOKENIZER.bos_token_id
    assert row.target[-1] == TOKENIZER.eos_token_id
    assert not specials & {*row.prompt[1:], *row.target[:-1]}
    assert TOKENIZER.decode(row.target[:-1]) == f"{special} ok"

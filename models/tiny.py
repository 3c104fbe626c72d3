"""A small random Gemma-2 and a small random Llama, built on the fly, for tests, demos and checks of a device.

In: an empty folder and a seed. Out: config, weights and a byte-level tokenizer in it. The Gemma-2 has everything that
makes one hard to get right: four norms per block with gains far from 1, soft-capping, sliding windows, tied embeddings.
"""

from __future__ import annotations

from pathlib import Path

SPECIALS = ["<pad>", "<eos>", "<bos>"]


def build_tiny_gemma2(folder: Path, seed: int, n_layers: int = 4, d_model: int = 32) -> None:
    """Saves the model and tokenizer to `folder`."""
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    tokenizer = byte_tokenizer()
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=4 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=d_model // 4,
        query_pre_attn_scalar=d_model // 4,
        sliding_window=64,
        max_position_embeddings=1024,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = Gemma2ForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:  # the gain is 1 + weight
                    parameter.copy_(torch.randn_like(parameter) * 0.5)
                else:
                    parameter.mul_(5.0)  # with the default 0.02 the blocks do almost nothing
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tiny_llama(folder: Path, seed: int) -> None:
    """The same with a Llama: 3 layers, d_model 24, untied embeddings, norm gains between 0.3 and 3."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name:
                    parameter.uniform_(0.3, 3.0)
                else:
                    parameter.mul_(6.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def byte_tokenizer():
    """A tokenizer of the 256 bytes and three special tokens; it needs no file and no training."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIALS, *alphabet])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")

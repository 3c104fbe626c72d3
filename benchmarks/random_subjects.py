"""Random models, activations and rows with real shapes, for measuring speed on machines without models.

In: the name of a shape, or a number of tokens or rows. Out: a random transformers model with a byte tokenizer, random
pairs, generated rows.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data.requests.copy_text import shipped_copy_texts
from data.requests.generator import RequestOptions, tool_rows
from data.rows import Row, make_row
from models.blocks import BlockPath
from models.sources import load_tokenizer
from models.tiny import byte_tokenizer
from models.transcoder import Transcoder
from trainers.activations import Pairs


@dataclass(frozen=True)
class Shape:
    """A model's sizes, as in its config."""

    kind: str
    config: dict[str, Any]

    def build(self, device: str, dtype: torch.dtype, folder: Path) -> tuple[Any, Any]:
        """A random model of these sizes, and a byte tokenizer, which TransformerLens reads again from `folder`."""
        from transformers import AutoConfig, AutoModelForCausalLM

        byte_tokenizer().save_pretrained(folder)
        tokenizer = load_tokenizer(folder)
        config = AutoConfig.for_model(self.kind, **self.config, pad_token_id=0, eos_token_id=1, bos_token_id=2)
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        return model.eval(), tokenizer


SHAPES = {
    "smollm2": Shape(
        "llama",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": True,
        },
    ),
    "gemma2_2b": Shape(
        "gemma2",
        {
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "query_pre_attn_scalar": 256,
        },
    ),
    "tiny": Shape(
        "gemma2",
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
        },
    ),
}


def random_pairs(device: str, d_model: int, tokens: int, shard: int = 65536) -> Pairs:
    """x and y in bf16, in host memory."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(count: int) -> Tensor:
        return torch.randn(count, d_model, generator=generator, device=device).bfloat16().cpu()

    counts = [min(shard, tokens - start) for start in range(0, tokens, shard)]
    return Pairs([(normal(count), normal(count)) for count in counts])


def random_rows(count: int) -> list[Row]:
    """Half requests and half sentences to copy."""
    rng = random.Random("benchmark")
    sources: Sequence[Iterator[Row]] = (
        tool_rows(rng, RequestOptions()),
        (make_row(text, text, "copy") for text in cycle(shipped_copy_texts())),
    )
    return [next(sources[index % 2]) for index in range(count)]


def save_other_blocks(model: Any, layers: Sequence[int], folder: Path) -> None:
    """Saves the model's config and the tensors of those layers' blocks, with other weights of MLP and attention."""
    from safetensors.torch import save_file

    tensors = {}
    for name, tensor in model.state_dict().items():
        if any(f".layers.{layer}." in name for layer in layers):
            changed = tensor * (1 + 0.05 * torch.randn_like(tensor)) if "proj" in name else tensor
            tensors[name] = changed.cpu().contiguous()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(model.config.to_dict(), default=str))


def random_delta(path: BlockPath, d_new: int, device: str) -> Transcoder:
    """A delta for a site, with features of which some are on."""
    generator = torch.Generator().manual_seed(path.site.layer)
    weights = {
        "W_enc": torch.randn(path.d_in, d_new, generator=generator) / path.d_in**0.5,
        "b_enc": torch.zeros(d_new),
        "threshold": torch.full((d_new,), 0.4),
        "W_dec": torch.randn(d_new, path.d_out, generator=generator) / path.d_out,
    }
    return Transcoder(**weights, b_dec=None, site=path.site).to(device)

"""What the compatibility check exports, and what must be computed from it.

In: an empty folder. Out: in it two small models, inputs, the exports in every format; and our own results, by name.
The models are a Gemma-2 (`sandwich_norm`) and a Llama (`pre_norm`): the TransformerLens that circuit-tracer uses takes
a folder named `llama` for one of Meta's own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from models.blocks import hooks_at
from models.bridge import whole, wrap
from models.exports import ExportedModel, write_circuit_tracer, write_gemma_scope, write_saelens
from models.fuse import fuse
from models.sources import load_model
from models.tiny import build_tiny_gemma2, byte_tokenizer
from models.transcoder import Transcoder
from sites import Site

N_LAYERS, D_MODEL, D_SAE, D_NEW = 4, 32, 200, 12
ALPHA = {0: None, 1: 1.0, 3: 0.7}
"""Strength of the delta by layer; None: a base alone. Layer 2 has no transcoder at all."""


def prepare(folder: Path) -> dict[str, Tensor]:
    """Fills `folder` with models, inputs and exports; returns what must come out of them.

    `output.L` (256, d_model): base + alpha * delta of layer L on `x.L`. `MODEL.acts.L` (positions, d_sae): activations
    of layer L in the untouched model; `MODEL.logits` (1, positions, vocabulary): with all three layers spliced.
    """
    disable_progress_bar()
    build_tiny_gemma2(folder / "sandwich_norm", seed=0, n_layers=N_LAYERS, d_model=D_MODEL)
    _build_tiny_llama(folder / "pre_norm")
    generator = torch.Generator().manual_seed(0)
    inputs = {f"x.{layer}": torch.randn(256, D_MODEL, generator=generator) for layer in ALPHA}
    # 2 is BOS, 3 and up are bytes.
    inputs["tokens"] = torch.cat([torch.tensor([[2]]), torch.randint(3, 259, (1, 15), generator=generator)], dim=1)
    save_file(inputs, folder / "inputs.safetensors")

    exported: dict[Site, Transcoder] = {}
    results = {f"output.{layer}": torch.zeros(256, D_MODEL) for layer in range(N_LAYERS)}
    for layer, alpha in ALPHA.items():
        base, x = _transcoder(layer, D_SAE, generator, bias=True), inputs[f"x.{layer}"]
        exported[Site(layer)], results[f"output.{layer}"] = base, base(x)
        if alpha is not None:
            delta = _transcoder(layer, D_NEW, generator, bias=False)
            exported[Site(layer)], results[f"output.{layer}"] = fuse(base, delta, alpha), base(x) + alpha * delta(x)
    for name in ("sandwich_norm", "pre_norm"):
        in_model = _in_model(folder / name, inputs["tokens"], exported)
        results |= {f"{name}.{what}": tensor for what, tensor in in_model.items()}

    model = ExportedModel(str(folder / "pre_norm"), N_LAYERS, D_MODEL, context_size=128)
    notes = {"alpha": {str(layer): 0.0 if alpha is None else alpha for layer, alpha in ALPHA.items()}}
    card = "---\ntags: [transcoder]\n---\n"
    write_gemma_scope(exported, model, folder / "gemma_scope", dict.fromkeys(exported, 50.0), notes, card)
    write_saelens(exported, model, folder / "saelens", notes, card)
    write_circuit_tracer(exported, model, folder / "circuit_tracer", notes, card)
    for name in ("saelens", "circuit_tracer"):
        _as_hub_repository(folder / name, folder / "hub")
    return results


def _transcoder(layer: int, d_sae: int, generator: torch.Generator, bias: bool) -> Transcoder:
    """Random weights and thresholds between -0.1 and 1, where pre-activations of unit-variance inputs are dense."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    return Transcoder(
        W_enc=normal(D_MODEL, d_sae) / D_MODEL**0.5,
        b_enc=0.1 * normal(d_sae),
        threshold=1.1 * torch.rand(d_sae, generator=generator) - 0.1,
        W_dec=normal(d_sae, D_MODEL) / d_sae**0.5,
        b_dec=0.3 * normal(D_MODEL) if bias else None,
        site=Site(layer),
    )


@torch.inference_mode()
def _in_model(folder: Path, tokens: Tensor, transcoders: dict[Site, Transcoder]) -> dict[str, Tensor]:
    """Activations of every transcoder in the untouched model, and the logits with all of them spliced in."""
    bridge = wrap(*load_model(folder, torch.float32))
    seen: dict[Site, Tensor] = {}

    def reader(site: Site) -> Callable:
        return lambda x: seen.__setitem__(site, x)

    def writer(site: Site) -> Callable:
        return lambda y, columns: transcoders[site](seen[site])[..., columns]

    reads: list[Any] = [hook for site in transcoders for hook in hooks_at(bridge, site, reader(site))]
    writes: list[Any] = [hook for site in transcoders for hook in hooks_at(bridge, site, write=writer(site))]
    with whole(bridge):
        raw = bridge.run_with_hooks(tokens, fwd_hooks=reads)
    acts = {f"acts.{site.label}": transcoder.encode(seen[site][0]) for site, transcoder in transcoders.items()}
    with whole(bridge):
        spliced = bridge.run_with_hooks(tokens, fwd_hooks=reads + writes)
    if (spliced - raw).abs().max() < 0.1:
        raise AssertionError(f"{folder.name}: splicing hardly changes the logits, so comparing them would show nothing")
    return acts | {"logits": spliced}


def _build_tiny_llama(folder: Path) -> None:
    """A random Llama with norm gains far from 1: an input tap on the wrong side of the gain would show."""
    tokenizer = byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=D_MODEL,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    torch.manual_seed(1)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.3, 3.0)
            else:
                parameter.mul_(6.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _as_hub_repository(folder: Path, cache: Path) -> None:
    """Lays `folder` out as the hub client's cache of `deltascope/NAME`, so that loaders from the hub run offline."""
    commit = "0" * 40
    repository = cache / f"models--deltascope--{folder.name}"
    for part in ("refs", "snapshots"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).symlink_to(folder.resolve())

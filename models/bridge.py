"""The model wrapped for TransformerLens, and the names of its taps.

In: a transformers model and its tokenizer. Out: a `TransformerBridge` around the same weights, with fast attention
if the architecture allows it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from models.errors import ModelError
from models.transcoder import RESID_MID_TAPS, Taps

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROUNDING = 1e-3
"""Of the largest logit: by so much may another attention kernel move one in fp32."""


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformerBridge:
    """Wraps `model` in place; no second copy of the weights is made.

    Raises ModelError where a model in fp32 computes something else than before.
    """
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    before = _some_logits(model) if model.dtype == torch.float32 else None
    bridge = TransformerBridge.boot_transformers(
        model.config._name_or_path or "local", hf_model=model, tokenizer=tokenizer, device=str(model.device)
    )
    # Booting switches to eager attention, which only soft-capped attention (Gemma-2) needs.
    if getattr(model.config, "attn_logit_softcapping", None) is None:
        model.set_attn_implementation("sdpa")
    if before is not None:  # in bf16, rounding alone moves logits by a third of the largest
        largest, apart = before.abs().max().item(), (_some_logits(model) - before).abs().max().item()
        if not apart <= largest * ROUNDING:
            raise ModelError(
                f"model.source: TransformerLens' bridge changes what a model of the architecture "
                f"{model.config.model_type} computes (logits up to {largest:.3g} differ by {apart:.3g}), so it cannot "
                "be looked at"
            )
    return bridge


def _some_logits(model: PreTrainedModel) -> Tensor:
    """Logits of a few tokens from all over the vocabulary."""
    import torch

    with torch.inference_mode():
        count = int(model.get_input_embeddings().weight.shape[0])  # type: ignore[arg-type,union-attr,index]
        ids = torch.linspace(count // 8, count - 2, 8, device=model.device).long().unsqueeze(0)
        return model(input_ids=ids, use_cache=False).logits.float()


def device_of(bridge: TransformerBridge) -> torch.device:
    """The device that holds the model's weights."""
    return next(bridge.original_model.parameters()).device  # type: ignore[operator]


def tap_names(taps: Taps, layer: int) -> tuple[str, str]:
    """The full hook names of a layer's input and output taps."""
    read = "hook_resid_mid" if taps.input == RESID_MID_TAPS.input else taps.input
    return f"blocks.{layer}.{read}", f"blocks.{layer}.{taps.output}"


def read_input(taps: Taps, activation: Tensor) -> Tensor:
    """What a transcoder reads, given the activation (..., d_model) at its input hook."""
    return activation / activation.shape[-1] ** 0.5 if taps.input == RESID_MID_TAPS.input else activation

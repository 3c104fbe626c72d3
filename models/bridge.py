"""The model wrapped for TransformerLens, and the names of its taps.

In: a transformers model and its tokenizer. Out: a `TransformerBridge` around the same weights, with fast attention
if the architecture allows it.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from models.transcoder import RESID_MID_TAPS, Taps

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformerBridge:
    """Wraps `model` in place; no second copy of the weights is made."""
    from transformer_lens.model_bridge import TransformerBridge

    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    bridge = TransformerBridge.boot_transformers(
        model.config._name_or_path or "local", hf_model=model, tokenizer=tokenizer, device=str(model.device)
    )
    # Booting switches to eager attention, which only soft-capped attention (Gemma-2) needs.
    if getattr(model.config, "attn_logit_softcapping", None) is None:
        model.set_attn_implementation("sdpa")
    return bridge


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

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

ROUNDING = {True: 1e-3, False: 0.1}
"""Of the largest logit: by so much may another attention kernel move one, in fp32 and in less."""


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformerBridge:
    """Wraps `model` in place; no second copy of the weights is made.

    Raises ModelError where the wrapped model computes something else than before.
    """
    from transformer_lens.model_bridge import TransformerBridge

    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    before = _some_logits(model)
    bridge = TransformerBridge.boot_transformers(
        model.config._name_or_path or "local", hf_model=model, tokenizer=tokenizer, device=str(model.device)
    )
    # Booting switches to eager attention, which only soft-capped attention (Gemma-2) needs.
    if getattr(model.config, "attn_logit_softcapping", None) is None:
        model.set_attn_implementation("sdpa")
    after = _some_logits(model)
    largest, apart = before.abs().max().item(), (after - before).abs().max().item()
    if not apart <= largest * ROUNDING[model.dtype.itemsize >= 4]:
        raise ModelError(
            f"model.source: TransformerLens' bridge changes what a model of the architecture {model.config.model_type} "
            f"computes (logits up to {largest:.3g} differ by {apart:.3g}), so it cannot be looked at"
        )
    return bridge


def _some_logits(model: PreTrainedModel) -> Tensor:
    """fp32 logits of a few tokens."""
    import torch

    with torch.inference_mode():
        ids = torch.arange(3, 11, device=model.device).unsqueeze(0)
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

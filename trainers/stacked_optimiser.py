"""Clipping and AdamW for models that train side by side in stacked tensors.

In: stacked tensors and their gradients. Out: each model's part, updated as if it trained alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from trainers.stacked_deltas import StackedDeltas


def clip_each(gradients: Sequence[Tensor], limit: float) -> Tensor:
    """Scales each model's gradients to a joint norm of at most `limit`; returns the norms before that, (n,).

    `gradients` are tensors or views of shape (n, ...). A spike in one model does not affect the others' steps.
    """
    if len(gradients[0]) == 1:
        return _clip(gradients, limit)
    parts = [torch.linalg.vector_norm(gradient, dim=tuple(range(1, gradient.ndim))) for gradient in gradients]
    norms = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    scale = (limit / (norms + 1e-6)).clamp(max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.view(-1, *[1] * (gradient.ndim - 1)))
    return norms


def _clip(gradients: Sequence[Tensor], limit: float) -> Tensor:
    """`clip_each` for one model, in fewer and larger calls."""
    norms = torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(list(gradients)))), dim=0, keepdim=True)
    scale = (norms + 1e-6).reciprocal_()
    torch._foreach_mul_(list(gradients), (scale if limit == 1.0 else scale.mul_(limit)).clamp_(max=1.0).view(()))
    return norms


class StackedAdamW:
    """AdamW for `parts` equal parts of the stack's replicas; weight decay applies only to the matrices.

    The fused optimiser needs contiguous tensors, so with several parts each has a copy of its columns of W_enc.
    """

    def __init__(self, model: StackedDeltas, parts: int, weight_decay: float) -> None:
        self.model = model
        tensors = [model.W_dec, model.b_enc, model.log_threshold]
        if parts == 1:
            self.encoders, self.rows = [model.W_enc], [tensors]
        else:
            self.encoders = [columns.contiguous() for columns in model.W_enc.chunk(parts, dim=1)]
            self.rows = [list(part) for part in zip(*(tensor.chunk(parts) for tensor in tensors), strict=True)]
        on_gpu = model.W_enc.is_cuda
        # A CUDA graph would bake in a number; it reads a tensor at each replay.
        self.rates: list[float | Tensor] = [model.W_enc.new_zeros(()) if on_gpu else 0.0 for _ in range(parts)]
        groups = []
        for rate, encoder, (W_dec, *offsets) in zip(self.rates, self.encoders, self.rows, strict=True):
            merged = [] if weight_decay else offsets  # one call instead of two
            groups.append({"params": [encoder, W_dec, *merged], "lr": rate, "weight_decay": weight_decay})
            if weight_decay:
                groups.append({"params": offsets, "lr": rate, "weight_decay": 0.0})
        self.adamw = torch.optim.AdamW(groups, lr=self.rates[0], fused=True, capturable=on_gpu)

    def set_rates(self, rates: Sequence[float]) -> None:
        """Sets each part's learning rate."""
        self.rates = [filled(current, rate) for current, rate in zip(self.rates, rates, strict=True)]
        groups_per_part = len(self.adamw.param_groups) // len(self.rates)
        for number, group in enumerate(self.adamw.param_groups):
            group["lr"] = self.rates[number // groups_per_part]

    def step(self) -> None:
        if len(self.encoders) > 1:
            self._share_gradients()
        self.adamw.step()
        if len(self.encoders) > 1:
            torch.cat(self.encoders, dim=1, out=self.model.W_enc)

    def read_weights(self) -> None:
        """Copies the stack's weights into the parts, after the stack was overwritten."""
        if len(self.encoders) > 1:
            for encoder, columns in zip(self.encoders, self.model.W_enc.chunk(len(self.encoders), dim=1), strict=True):
                encoder.copy_(columns)

    def _share_gradients(self) -> None:
        grads = [tensor.grad for tensor in (self.model.W_dec, self.model.b_enc, self.model.log_threshold)]
        assert self.model.W_enc.grad is not None
        parts = len(self.encoders)
        for encoder, columns in zip(self.encoders, self.model.W_enc.grad.chunk(parts, dim=1), strict=True):
            encoder.grad = columns.contiguous()
        chunks = (gradient.chunk(parts) for gradient in grads if gradient is not None)
        for tensors, *gradients in zip(self.rows, *chunks, strict=True):
            for tensor, gradient in zip(tensors, gradients, strict=True):
                tensor.grad = gradient


def filled(current: float | Tensor, value: float) -> float | Tensor:
    """`value`; written into `current` in place if that is a tensor."""
    return current.fill_(value) if isinstance(current, Tensor) else value

"""AdamW for deltas that share stacked tensors, each part of them with a learning rate of its own.

In: the stack and its gradients. Out: the stack, moved in place as an AdamW for each part would.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from trainers.stacked_deltas import StackedDeltas


class StackedAdamW:
    """`parts` equal parts of the stack's replicas; weight decay applies to the matrices alone.

    The fused optimiser wants tensors without gaps, so of several parts each has a copy of its columns of W_enc.
    """

    def __init__(self, model: StackedDeltas, parts: int, weight_decay: float) -> None:
        self.model = model
        self.encoders = [model.W_enc] if parts == 1 else [one.contiguous() for one in model.W_enc.chunk(parts, dim=1)]
        whole = [model.W_dec, model.b_enc, model.log_threshold]
        self.rows = [whole] if parts == 1 else [list(one) for one in zip(*(t.chunk(parts) for t in whole), strict=True)]
        on_gpu = model.W_enc.is_cuda
        # A number would be recorded with a CUDA graph as it is; a tensor is read at each replay.
        self.rates: list[float | Tensor] = [model.W_enc.new_zeros(()) if on_gpu else 0.0 for _ in range(parts)]
        groups = []
        for rate, encoder, (W_dec, *offsets) in zip(self.rates, self.encoders, self.rows, strict=True):
            together = [] if weight_decay else offsets  # one call instead of two
            groups.append({"params": [encoder, W_dec, *together], "lr": rate, "weight_decay": weight_decay})
            if weight_decay:
                groups.append({"params": offsets, "lr": rate, "weight_decay": 0.0})
        self.adamw = torch.optim.AdamW(groups, lr=self.rates[0], fused=True, capturable=on_gpu)

    def set_rates(self, rates: Sequence[float]) -> None:
        """Sets each part's learning rate."""
        self.rates = [held_or(held, rate) for held, rate in zip(self.rates, rates, strict=True)]
        of_part = len(self.adamw.param_groups) // len(self.rates)
        for number, group in enumerate(self.adamw.param_groups):
            group["lr"] = self.rates[number // of_part]

    def step(self) -> None:
        if len(self.encoders) > 1:
            self._share_gradients()
        self.adamw.step()
        if len(self.encoders) > 1:
            torch.cat(self.encoders, dim=1, out=self.model.W_enc)

    def read_weights(self) -> None:
        """Takes over the stack's weights after they were written."""
        if len(self.encoders) > 1:
            for own, columns in zip(self.encoders, self.model.W_enc.chunk(len(self.encoders), dim=1), strict=True):
                own.copy_(columns)

    def _share_gradients(self) -> None:
        found = [one.grad for one in (self.model.W_dec, self.model.b_enc, self.model.log_threshold)]
        assert self.model.W_enc.grad is not None
        parts = len(self.encoders)
        for encoder, columns in zip(self.encoders, self.model.W_enc.grad.chunk(parts, dim=1), strict=True):
            encoder.grad = columns.contiguous()
        for own, *gradients in zip(self.rows, *(one.chunk(parts) for one in found if one is not None), strict=True):
            for tensor, gradient in zip(own, gradients, strict=True):
                tensor.grad = gradient


def held_or(held: float | Tensor, value: float) -> float | Tensor:
    """`value`, in the tensor that holds it, if there is one."""
    return held.fill_(value) if isinstance(held, Tensor) else value

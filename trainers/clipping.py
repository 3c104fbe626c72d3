"""Gradient clipping for models that train side by side in stacked tensors.

In: gradients whose first dimension is the model, and a limit. Out: the gradients, scaled in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def clip_each(gradients: Sequence[Tensor], limit: float) -> Tensor:
    """Scales each model's gradients to a joint norm of at most `limit`; returns the norms before that, (n,).

    `gradients` are tensors or views of shape (n, ...). A spike in one model does not affect the others' steps.
    """
    if len(gradients[0]) == 1:
        return _clip(gradients, limit)
    parts = [torch.linalg.vector_norm(one, dim=tuple(range(1, one.ndim))) for one in gradients]
    norms = torch.linalg.vector_norm(torch.stack(parts), dim=0)
    scale = (limit / (norms + 1e-6)).clamp(max=1.0)
    for one in gradients:
        one.mul_(scale.view(-1, *[1] * (one.ndim - 1)))
    return norms


def _clip(gradients: Sequence[Tensor], limit: float) -> Tensor:
    """The same for one model, in fewer and larger calls."""
    norms = torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(list(gradients)))), dim=0, keepdim=True)
    scale = (norms + 1e-6).reciprocal_()
    torch._foreach_mul_(list(gradients), (scale if limit == 1.0 else scale.mul_(limit)).clamp_(max=1.0).view(()))
    return norms

"""Causal attention within the rows of a packed batch, with rotary embedding, as one autograd function.

In: queries, keys and values of all tokens (tokens, heads * dim). Out: the attention output; each row attends only to
itself. Saves each row's probabilities, (heads, length, length), for the backward pass, so it suits short rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from trainers.packing import Packed


class HeadIndex(NamedTuple):
    """Maps between (tokens, heads) and (row, head, place), both flattened; a row's heads that share a key head are
    adjacent."""

    heads: int
    take: Tensor
    back: Tensor


class Layout(NamedTuple):
    """What attention needs to know about a batch, the same in every layer. cos, sin: (tokens, 1, dim / 2).

    causal, windowed: (query heads per key head * longest, longest), added to scores. padding: (rows, 1, longest, 1),
    True after a row's end, or None if all rows are equally long.
    """

    queries: HeadIndex
    keys: HeadIndex
    padding: Tensor | None
    causal: Tensor
    windowed: Tensor
    cos: Tensor
    sin: Tensor
    scale: float
    cap: float | None


def layout_of(batch: Packed, config: Any, cos: Tensor, sin: Tensor) -> Layout:
    """The layout of a batch for a model with `config`; cos, sin: (tokens, dim) of its rotary embedding."""
    count, longest = batch.rows.shape
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    places = torch.arange(longest, device=cos.device)
    distance = places[:, None] - places
    causal = torch.zeros(longest, longest, dtype=cos.dtype, device=cos.device).masked_fill_(distance < 0, -torch.inf)
    windowed = causal.masked_fill(distance >= (getattr(config, "sliding_window", None) or longest), -torch.inf)
    padding = None
    if count * longest > len(batch.ids):
        padding = torch.ones(count * longest, dtype=torch.bool, device=cos.device)
        padding[batch.places] = False
        padding = padding.view(count, 1, longest, 1)
    dim = cos.shape[-1]
    return Layout(
        _index(batch, heads),
        _index(batch, kv_heads),
        padding,
        causal.repeat(heads // kv_heads, 1),
        windowed.repeat(heads // kv_heads, 1),
        cos[:, None, : dim // 2],
        sin[:, None, : dim // 2],
        getattr(config, "query_pre_attn_scalar", dim) ** -0.5,
        getattr(config, "attn_logit_softcapping", None),
    )


def _index(batch: Packed, heads: int) -> HeadIndex:
    longest = batch.rows.shape[1]
    head = torch.arange(heads, device=batch.ids.device)
    take = batch.rows[:, None, :] * heads + head[:, None]
    row, place = batch.places // longest, batch.places % longest
    back = (row[:, None] * heads + head) * longest + place[:, None]
    return HeadIndex(heads, take.flatten(), back.flatten())


class Attention(Function):
    """`apply(q, k, v, layout, mask)`: q (tokens, heads * dim), k and v (tokens, kv_heads * dim), not yet rotated."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, mask: Tensor) -> Tensor:
        groups = len(mask) // mask.shape[1], layout.keys.heads
        q = _gather(_rotate(q, layout.queries, layout.cos, layout.sin), layout.queries, groups[0], mask)
        k = _gather(_rotate(k, layout.keys, layout.cos, layout.sin), layout.keys, 1, mask)
        v = _gather(v, layout.keys, 1, mask)
        scores, _ = _scores(q, k, layout, mask)
        weights = scores.softmax(-1)
        ctx.layout, ctx.mask = layout, mask
        ctx.save_for_backward(q, k, v, weights)
        return _scatter(weights @ v, layout.queries)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # type: ignore[override]
        q, k, v, weights = ctx.saved_tensors
        layout, mask = ctx.layout, ctx.mask
        g = _gather(gradient, layout.queries, len(mask) // mask.shape[1], mask)
        if layout.padding is not None:
            # Places after a row's end repeat its last token; mask them so that its gradient is counted once.
            g.view(len(layout.padding), layout.queries.heads, -1, g.shape[-1]).masked_fill_(layout.padding, 0)
        v_gradient = weights.transpose(1, 2) @ g
        s = torch._softmax_backward_data(g @ v.transpose(1, 2), weights, -1, weights.dtype)
        if layout.cap is not None:
            s = s * (1 - _scores(q, k, layout, mask)[1].square())
        s.mul_(layout.scale)
        q_gradient = _scatter(s @ k, layout.queries)
        k_gradient = _scatter(s.transpose(1, 2) @ q, layout.keys)
        return (
            _rotate(q_gradient, layout.queries, layout.cos, -layout.sin),
            _rotate(k_gradient, layout.keys, layout.cos, -layout.sin),
            _scatter(v_gradient, layout.keys),
            None,
            None,
        )


def _rotate(x: Tensor, index: HeadIndex, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding (arXiv 2104.09864) of x (tokens, heads * dim); with -sin, its inverse."""
    split = x.view(len(x), index.heads, -1)
    half = split.shape[-1] // 2
    first, second = split[..., :half], split[..., half:]
    out = torch.empty_like(split)
    torch.mul(first, cos, out=out[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out[..., half:]).addcmul_(first, sin)
    return out.view_as(x)


def _gather(x: Tensor, index: HeadIndex, shared: int, mask: Tensor) -> Tensor:
    """(tokens, heads * dim) to (rows * key heads, `shared` heads * longest, dim)."""
    dim = x.shape[1] // index.heads
    return x.reshape(-1, dim).index_select(0, index.take).view(-1, shared * mask.shape[1], dim)


def _scatter(x: Tensor, index: HeadIndex) -> Tensor:
    """The inverse of `_gather`; places after a row's end are dropped."""
    dim = x.shape[-1]
    return x.reshape(-1, dim).index_select(0, index.back).view(-1, index.heads * dim)


def _scores(q: Tensor, k: Tensor, layout: Layout, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Masked scores, and the tanh that caps them if the model uses soft-capping."""
    if layout.cap is None:
        return torch.baddbmm(mask, q, k.transpose(1, 2), alpha=layout.scale), q
    bounded = torch.bmm(q, k.transpose(1, 2)).mul_(layout.scale / layout.cap).tanh_()
    return torch.add(mask, bounded, alpha=layout.cap), bounded

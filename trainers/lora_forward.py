"""A LoRA-adapted Llama, Gemma-2 or Gemma-3 over packed rows; its forward and backward passes are written for speed.

In: a PEFT model, whose parameters are used in place, and a `Packed` batch. Out: logits at the batch's `scored` tokens;
only the adapter gets gradients. Adapters of projections that share an input are computed as one product; frozen weights
get no gradient, so no activations are saved for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from trainers.packed_attention import Attention, Layout, layout_of
from trainers.packing import Packed

LONGEST_ROW = 1024
"""Attention saves (heads, length, length) numbers for every row and layer, so rows must be short."""
GEMMAS = ("gemma2", "gemma3_text")
ARCHITECTURES = ("llama", *GEMMAS)
CROSS_ENTROPY_NUMBERS = (2**20, 2**26)
"""How many logits to process at once: what fits in a CPU's cache, and what keeps a GPU busy."""


def can_fuse(adapted: Any, longest: int) -> bool:
    """Whether `FusedForward` computes the same as this model, for rows of up to `longest` tokens."""
    config, base = adapted.config, adapted.get_base_model()
    return (
        config.model_type in ARCHITECTURES
        and longest <= LONGEST_ROW
        and not config.attention_dropout
        and not getattr(config, "use_bidirectional_attention", False)
        and not any(hasattr(end, "base_layer") for end in (base.lm_head, base.model.embed_tokens))
    )


class FusedForward:
    """`forward(packed)`: logits (scored, vocabulary) in the model's dtype.

    With `checkpointing`, blocks keep only their input and are recomputed in the backward pass.
    """

    def __init__(self, adapted: Any, checkpointing: bool = False) -> None:
        self.adapted, self.checkpointing = adapted, checkpointing
        self.model = adapted.get_base_model()
        self.config = self.model.config
        gemma = self.config.model_type in GEMMAS
        self.blocks = [_Block(layer, gemma) for layer in self.model.model.layers]
        self.norm = _Norm(self.model.model.norm, gemma)

    @property
    def training(self) -> bool:
        return self.adapted.training

    def train(self, mode: bool = True) -> None:
        self.adapted.train(mode)

    def __call__(self, batch: Packed) -> Tensor:
        stream = self.model.model.embed_tokens(batch.ids)
        layouts = self._layouts(batch, stream)
        for block in self.blocks:
            block.refresh(stream.dtype)
            layout = layouts[block.rotation]
            scored = batch.scored if block is self.blocks[-1] else None
            if self.checkpointing and torch.is_grad_enabled():
                stream = checkpoint(block, stream, layout, scored, use_reentrant=False)
            else:
                stream = block(stream, layout, scored)
        logits = self.model.lm_head(self.norm(stream))
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else (logits / cap).tanh().mul(cap)

    def _layouts(self, batch: Packed, stream: Tensor) -> dict[str | None, Layout]:
        """The batch's layout for each kind of rotary embedding in the model."""
        tables, positions = self.model.model.rotary_emb, batch.positions.unsqueeze(0)
        rotations = {
            name: tables(stream, positions) if name is None else tables(stream, positions, name)
            for name in {block.rotation for block in self.blocks}
        }
        return {name: layout_of(batch, self.config, cos[0], sin[0]) for name, (cos, sin) in rotations.items()}


class _Block:
    """One decoder block."""

    def __init__(self, layer: Any, gemma: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        gemma3 = hasattr(attention, "q_norm")
        self.qkv = _Projections(attention.q_proj, attention.k_proj, attention.v_proj)
        self.output = _Projections(attention.o_proj)
        self.gate_up = _Projections(mlp.gate_proj, mlp.up_proj)
        self.down = _Projections(mlp.down_proj)
        self.windowed = getattr(attention, "sliding_window", None) is not None
        self.of_heads = [_Norm(norm, True) for norm in (attention.q_norm, attention.k_norm)] if gemma3 else None
        self.rotation: str | None = attention.layer_type if gemma3 else None
        self.activation = mlp.act_fn
        self.before_attention = _Norm(layer.input_layernorm, gemma)
        second = layer.pre_feedforward_layernorm if gemma else layer.post_attention_layernorm
        self.before_mlp = _Norm(second, gemma)
        self.after_attention = _Norm(layer.post_attention_layernorm, gemma) if gemma else None
        self.after_mlp = _Norm(layer.post_feedforward_layernorm, gemma) if gemma else None

    def refresh(self, dtype: torch.dtype) -> None:
        for projections in (self.qkv, self.output, self.gate_up, self.down):
            projections.refresh(dtype)

    def __call__(self, stream: Tensor, layout: Layout, scored: Tensor | None) -> Tensor:
        """The residual stream (tokens, d_model) after the block; with `scored`, only at those tokens."""
        q, k, v = self.qkv(self.before_attention(stream))
        if self.of_heads is not None:
            q, k = (norm.of_heads(x) for norm, x in zip(self.of_heads, (q, k), strict=True))
        attended = Attention.apply(q, k, v, layout, layout.windowed if self.windowed else layout.causal)
        if scored is not None:
            attended, stream = attended[scored], stream[scored]
        (added,) = self.output(attended)
        stream = stream + (self.after_attention(added) if self.after_attention else added)
        gate, up = self.gate_up(self.before_mlp(stream))
        (added,) = self.down(self.activation(gate) * up)
        return stream + (self.after_mlp(added) if self.after_mlp else added)


class _Projections:
    """Linear modules that share an input, adapted or not."""

    def __init__(self, *modules: Any) -> None:
        bases = [getattr(module, "base_layer", module) for module in modules]
        self.frozen = [(base.weight.detach(), None if base.bias is None else base.bias.detach()) for base in bases]
        adapted = [hasattr(module, "base_layer") for module in modules]
        self.adapters = [module for module, is_adapted in zip(modules, adapted, strict=True) if is_adapted]
        order = iter(range(len(self.adapters)))
        self.adapter_of = [next(order) if is_adapted else None for is_adapted in adapted]
        self.weights: list[Tensor] = []
        self.scales: list[float] = []
        for module in self.adapters:
            (name,) = module.active_adapters
            self.weights += [module.lora_A[name].weight, module.lora_B[name].weight]
            self.scales.append(module.scaling[name])
            self.dropout: nn.Module = module.lora_dropout[name]
        self.ranks = [len(down) for down in self.weights[::2]]

    def refresh(self, dtype: torch.dtype) -> None:
        """Copies the adapters' current weights in `dtype`: all A stacked, and each B."""
        if self.adapters:
            self.downs = torch.cat([down.detach() for down in self.weights[::2]]).to(dtype)
            self.ups = [up.detach().to(dtype) for up in self.weights[1::2]]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """The modules' outputs for x (tokens, in), each (tokens, out)."""
        dropped = None
        if self.adapters and isinstance(self.dropout, nn.Dropout) and self.dropout.training:
            dropped = functional.dropout(x.expand(len(self.adapters), *x.shape), self.dropout.p)
        return _Projected.apply(x, dropped, self, *self.weights)


class _Projected(Function):
    """y_i = x W_i^T + b_i + scale_i (x A_i^T) B_i^T for one x and several i, where W_i and b_i are frozen.

    With dropout, the adapters read `dropped` (adapters, tokens, in) instead of x.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dropped: Tensor | None, group: _Projections, *weights: Tensor) -> Any:
        outputs = [functional.linear(x, weight, bias) for weight, bias in group.frozen]
        low = None
        if weights:
            low = functional.linear(x, group.downs) if dropped is None else _each(dropped, group.downs, group.ranks)
            parts = low.split(group.ranks, dim=1)
            for y, index in zip(outputs, group.adapter_of, strict=True):
                if index is not None:
                    y.addmm_(parts[index], group.ups[index].t(), alpha=group.scales[index])
        ctx.group = group
        ctx.save_for_backward(x if weights else None, dropped, low)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, dropped, low = ctx.saved_tensors
        group = ctx.group
        x_gradient = dropped_gradient = None
        if ctx.needs_input_grad[0]:
            for g, (weight, _) in zip(gradients, group.frozen, strict=True):
                x_gradient = g @ weight if x_gradient is None else x_gradient.addmm_(g, weight)
        if not group.adapters:
            return x_gradient, None, None
        low_gradient = torch.empty_like(low)
        low_gradients, parts = low_gradient.split(group.ranks, dim=1), low.split(group.ranks, dim=1)
        ups = []
        for g, index in zip(gradients, group.adapter_of, strict=True):
            if index is not None:
                scale = group.scales[index]
                to_part = low_gradients[index]
                torch.addmm(to_part, g, group.ups[index], beta=0, alpha=scale, out=to_part)
                ups.append((parts[index].t() @ g).t().mul(scale))
        if dropped is None:
            downs = (low_gradient.t() @ x).split(group.ranks)
            if x_gradient is not None:
                x_gradient.addmm_(low_gradient, group.downs)
        else:
            downs = tuple(part.t() @ inputs for part, inputs in zip(low_gradients, dropped, strict=True))
            if ctx.needs_input_grad[1]:
                pieces = group.downs.split(group.ranks)
                dropped_gradient = torch.stack([part @ down for part, down in zip(low_gradients, pieces, strict=True)])
        dtype = group.weights[0].dtype
        weight_gradients = [gradient.to(dtype) for pair in zip(downs, ups, strict=True) for gradient in pair]
        return x_gradient, dropped_gradient, None, *weight_gradients


def _each(dropped: Tensor, downs: Tensor, ranks: Sequence[int]) -> Tensor:
    """Each adapter's own input times its own A, side by side (tokens, sum of ranks)."""
    pieces = downs.split(list(ranks))
    return torch.cat([functional.linear(x, down) for x, down in zip(dropped, pieces, strict=True)], dim=1)


class _Norm:
    """RMS normalisation with a frozen gain, computed in fp32."""

    def __init__(self, module: Any, gemma: bool) -> None:
        weight = module.weight.detach().float()
        self.gain = 1.0 + weight if gemma else weight
        self.eps = module.eps if gemma else module.variance_epsilon

    def __call__(self, x: Tensor) -> Tensor:
        return _RmsNorm.apply(x, self.gain, self.eps)

    def of_heads(self, x: Tensor) -> Tensor:
        """Each head of x (tokens, heads * dim) normalised on its own."""
        return self(x.unflatten(-1, (-1, len(self.gain)))).flatten(1)


class _RmsNorm(Function):
    """x / rms(x) * gain; saves x and one number per token."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, inverse, gain)
        return (x * inverse).mul_(gain).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        x, inverse, gain = ctx.saved_tensors
        scaled = gradient * gain
        unit = x * inverse
        along = (scaled * unit).mean(-1, keepdim=True)
        return scaled.addcmul_(unit, along, value=-1).mul_(inverse).to(x.dtype), None, None


def cross_entropy_sum(logits: Tensor, labels: Tensor, divisor: float = 1.0) -> Tensor:
    """Cross-entropy in fp32, summed over the n rows of logits (n, vocabulary) and divided by `divisor`. Overwrites the
    logits with the gradient."""
    return _CrossEntropy.apply(logits, labels, divisor)


class _CrossEntropy(Function):
    """A few rows at a time, so that the fp32 intermediates stay in the CPU's cache."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, divisor: float) -> Tensor:
        logits = logits.detach()
        total = torch.zeros((), device=logits.device)
        at_once = max(1, CROSS_ENTROPY_NUMBERS[logits.is_cuda] // logits.shape[1])
        for chunk, targets in zip(logits.split(at_once), labels.unsqueeze(1).split(at_once), strict=True):
            values = chunk.float()
            top = values.amax(-1, keepdim=True)
            values = values.sub_(top)
            chosen = values.gather(1, targets)
            sums = values.exp_().sum(-1, keepdim=True)
            total += (sums.log() - chosen).sum()
            if ctx.needs_input_grad[0]:
                gradient = values.div_(sums * divisor).scatter_add_(1, targets, torch.full_like(sums, -1 / divisor))
                chunk.copy_(gradient)
        ctx.gradient = logits
        return total / divisor

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.gradient.mul_(gradient), None, None

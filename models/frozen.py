"""Attention patterns and norms' denominators as constants, so that gradients take the linear paths only.

In: a TransformerBridge. Out: a context in which passes compute the same values, and gradients treat the patterns, or
the denominators, as if they were given. A model in which they cannot be frozen is refused, not frozen in part.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from models.bridge import Hook, device_of, hook_names, hooked, unhooked_norms
from models.errors import ModelError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

PROBED = 6
"""Tokens of the pass that checks whether a model's hooks act."""


class Frozen(NamedTuple):
    """What gradients treat as constant."""

    patterns: bool = False
    norms: bool = False


@contextmanager
def frozen(bridge: TransformerBridge, constants: Frozen) -> Iterator[None]:
    """Inside the `with`, gradients do not pass through what is frozen; values differ only by rounding."""
    with _edited(bridge, [(name, _detach) for name in hooks_of(bridge, constants)]):
        yield


def hooks_of(bridge: TransformerBridge, constants: Frozen) -> list[str]:
    """The names of the hooks where it is frozen: a pattern in each block, and the denominator of every norm."""
    available, names = hook_names(bridge), []
    if constants.patterns:
        names += [f"blocks.{layer}.attn.hook_pattern" for layer in range(bridge.cfg.n_layers)]
    if constants.norms:
        names += [name for name in available if name.endswith(".hook_scale")]
    return names


def check_frozen(bridge: TransformerBridge, constants: Frozen) -> None:
    """Raises ModelError if this model does not expose what is to be frozen, or ignores what a hook makes of it. Takes a
    pass over a few tokens, and its gradient."""
    # One by one, because norms within frozen patterns do not act.
    for single in (Frozen(constants.patterns, False), Frozen(False, constants.norms)):
        _check(bridge, single)


def _check(bridge: TransformerBridge, constants: Frozen) -> None:
    names, available = hooks_of(bridge, constants), hook_names(bridge)
    missing = [name for name in names if name not in available]
    unseen = unhooked_norms(bridge) if constants.norms else []
    if names and not missing and not unseen:
        acting = _acting(bridge, names)
        unseen = [name for name in names if name not in acting]
    if missing or unseen:
        first, patterns = (missing or unseen)[0], (missing or unseen)[0].endswith("hook_pattern")
        parts, option = ("attention patterns", "patterns") if patterns else ("norms' denominators", "norms")
        model: Any = bridge.original_model
        raise ModelError(
            f"the {parts} of the architecture {model.config.model_type} cannot be frozen: TransformerLens does not "
            f"compute with its hook at {first}; use --free-{option}"
        )


def _acting(bridge: TransformerBridge, names: list[str]) -> set[str]:
    """The hooks whose result the model computes with: its output has a gradient there."""
    leaves: dict[str, Tensor] = {}

    def leaf(name: str) -> Callable[[Tensor, object], Tensor]:
        def replace(value: Tensor, hook: object) -> Tensor:
            leaves[name] = value.detach().clone().requires_grad_()
            return leaves[name]

        return replace

    model: Any = bridge.original_model
    count = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.linspace(count // 8, count - 2, PROBED, device=device_of(bridge)).long().unsqueeze(0)
    with torch.enable_grad(), _edited(bridge, [(name, leaf(name)) for name in names]):
        logits = model(input_ids=ids, use_cache=False).logits.float()
        if not logits.requires_grad:
            return set()
        gradients = torch.autograd.grad(logits.square().sum(), list(leaves.values()), allow_unused=True)
    return {name for name, gradient in zip(leaves, gradients, strict=True) if gradient is not None}


def _detach(value: Tensor, hook: object) -> Tensor:
    return value.detach()


@contextmanager
def _edited(bridge: TransformerBridge, hooks: list[Hook]) -> Iterator[None]:
    with hooked(bridge, hooks), warnings.catch_warnings():
        # An edited norm is computed in TransformerLens' order of operations, and each time it warns about that.
        warnings.filterwarnings("ignore", message="A forward hook edited hook_scale")
        yield

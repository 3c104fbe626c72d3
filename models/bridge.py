"""The model wrapped for TransformerLens, and its hooks.

In: a transformers model and its tokenizer. Out: a `TransformerBridge` around the same weights. Its components are in
the model only where there is a hook: each computes the same as the module that it wraps, but in Python, which takes
longer than a small model's arithmetic.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from models.errors import ModelError
from models.no_installs import nothing_installed
from sites import KINDS, READINGS, Site

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Hook = tuple[str, "Callable[[Tensor, object], Tensor | None]"]
"""A hook's full name, and a function of the activation there; unless it returns None, the result replaces it."""
ROUNDING = 1e-3
"""Tolerance for another attention kernel in fp32, relative to the largest logit."""


class _Seat(NamedTuple):
    """A place in the model that holds either a module or the bridge's component that wraps it."""

    parent: nn.Module
    name: str
    part: Any

    @property
    def is_attached(self) -> bool:
        return self.parent._modules[self.name] is self.part

    def attach(self) -> None:
        self.parent._modules[self.name] = self.part

    def detach(self) -> None:
        self.parent._modules[self.name] = self.part.original_component


class _Wiring(NamedTuple):
    """How a bridge is wired: hook points by name, the places of its components, for each hook point the places of the
    components that run it, and its blocks."""

    points: dict[str, Any]
    seats: list[_Seat]
    owners: dict[int, list[_Seat]]
    blocks: list[Any]


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformerBridge:
    """Wraps `model` in place, without copying the weights, and turns their gradients off. Set hooks with `hooked`.

    Raises ModelError if wrapping changes what an fp32 model computes.
    """
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    before = _some_logits(model) if model.dtype == torch.float32 else None
    if before is not None and not torch.isfinite(before).all():
        raise ModelError(
            f"model.source: the logits of {model.config._name_or_path or 'the model'} are not finite numbers: its "
            "weights hold NaN or infinite values, or values too large for fp32"
        )
    # This switches to eager attention, which the bridge's own components match to the last bit.
    with nothing_installed():
        bridge = TransformerBridge.boot_transformers(
            model.config._name_or_path or "local", hf_model=model, tokenizer=tokenizer, device=str(model.device)
        )
    bridge.__dict__["wiring"] = _find_wiring(bridge)
    model.requires_grad_(False)  # while all components are attached, because some have copies of weights
    after = _some_logits(model)
    if before is not None:  # in bf16, rounding alone moves logits by a third of the largest
        largest, apart = before.abs().max().item(), (after - before).abs().max().item()
        if not apart <= largest * ROUNDING:
            raise ModelError(
                f"model.source: TransformerLens' bridge changes what a model of the architecture "
                f"{model.config.model_type} computes (logits up to {largest:.3g} differ by {apart:.3g}), so it is not "
                "supported"
            )
    _detach_all(bridge, after)
    bridge.__dict__["tuples"] = _blocks_give_tuples(bridge)
    return bridge


def _blocks_give_tuples(bridge: TransformerBridge) -> bool:
    seen: list[bool] = []
    blocks: Any = bridge.blocks
    handle = blocks[0].register_forward_hook(lambda module, inputs, output: seen.append(isinstance(output, tuple)))
    _some_logits(bridge.original_model)  # type: ignore[arg-type]
    handle.remove()
    return seen[0]


def as_block_output(bridge: TransformerBridge, stream: Tensor) -> Tensor | tuple[Tensor]:
    """A stream in the form in which this model's blocks return it: by itself, or first in a tuple."""
    return (stream,) if bridge.__dict__["tuples"] else stream


def _detach_all(bridge: TransformerBridge, logits: Tensor) -> None:
    """Detaches the bridge's components from its model if that changes no bit of `logits`, neither without hooks nor
    with hooks in every block, and each of these hooks still runs. Otherwise all stay attached: the bridge does not
    compute a LayerNorm in torch's order, for example."""
    import torch

    model: Any = bridge.original_model
    kinds = dict.fromkeys([*KINDS.values(), *READINGS.values()])
    sites = [Site(layer, kind) for layer in range(bridge.cfg.n_layers) for kind in kinds]
    known = set(hook_names(bridge))
    names = {name for site in sites for name in (site.reads, *site.writes(known), f"blocks.{site.layer}.hook_out")}
    names &= known
    seen: set[str] = set()

    def note(name: str) -> Callable:
        return lambda activation, hook: seen.add(name)

    for seat in _wiring(bridge).seats:
        seat.detach()
    try:
        unhooked = _some_logits(model)
        with hooked(bridge, [(name, note(name)) for name in sorted(names)]):
            with_hooks = _some_logits(model)
        same = torch.equal(unhooked, logits) and torch.equal(with_hooks, logits) and seen == names
    except Exception:  # whatever a pass without the components raises, with them it works
        same = False
    if not same:
        for seat in _wiring(bridge).seats:
            seat.attach()


@contextmanager
def hooked(bridge: TransformerBridge, hooks: Sequence[Hook]) -> Iterator[None]:
    """Runs `hooks`, pairs of a hook's name and a function (activation, hook), in every pass inside the `with`.

    The bridge's own `hooks` needs its components attached, and looks all names up again, which takes milliseconds. For
    that and its other methods, attach all components with `whole`.
    Raises KeyError for a name that is not one of `hook_names`.
    """
    wiring = _wiring(bridge)
    points = [wiring.points[name] for name, _ in hooks]
    with _seated([seat for point in points for seat in wiring.owners.get(id(point), wiring.seats)]):
        handles = []
        try:
            for point, (_, run) in zip(points, hooks, strict=True):
                handles.append((point, point.add_hook(run)))
            yield
        finally:
            for point, handle in handles:
                handle.hook.remove()
                point.fwd_hooks.remove(handle)


def hook_names(bridge: TransformerBridge) -> Collection[str]:
    """The names of all hooks."""
    return _wiring(bridge).points.keys()


def unhooked_norms(bridge: TransformerBridge) -> list[str]:
    """The names of the model's norms whose denominators no hook shows."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    shown = {id(seat.part.original_component) for seat in _wiring(bridge).seats if hasattr(seat.part, "hook_scale")}
    model: Any = bridge.original_model
    return [
        name.replace("_original_component.", "")
        for name, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        and not isinstance(module, GeneralizedComponent)
        and id(module) not in shown
    ]


@contextmanager
def whole(bridge: TransformerBridge) -> Iterator[None]:
    """Inside the `with`, every component of the bridge is attached, as TransformerLens leaves it."""
    with _seated(_wiring(bridge).seats):
        yield


@contextmanager
def _seated(seats: Sequence[_Seat]) -> Iterator[None]:
    attached = []
    for seat in seats:
        if not seat.is_attached:
            seat.attach()
            attached.append(seat)
    try:
        yield
    finally:
        for seat in attached:
            seat.detach()


def block_of(bridge: TransformerBridge, layer: int) -> Any:
    """The bridge's component that wraps a layer's block, attached or not."""
    return _wiring(bridge).blocks[layer]


def _wiring(bridge: TransformerBridge) -> _Wiring:
    return bridge.__dict__["wiring"]


def _find_wiring(bridge: TransformerBridge) -> _Wiring:
    """The wiring as TransformerLens made it; all components must be attached."""
    from transformer_lens.hook_points import HookPoint
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    model: Any = bridge.original_model
    seats = [
        _Seat(parent, name, part)
        for parent in model.modules()
        if not isinstance(parent, GeneralizedComponent)
        for name, part in parent._modules.items()
        if isinstance(part, GeneralizedComponent) and part.original_component is not None
    ]
    owners: dict[int, list[_Seat]] = {}
    for seat in seats:
        for child in seat.part.children():
            if isinstance(child, HookPoint):
                owners.setdefault(id(child), []).append(seat)
    return _Wiring(dict(bridge.hook_dict), seats, owners, list(bridge.blocks))  # type: ignore[arg-type]


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

"""The model wrapped for TransformerLens, and its hooks.

In: a transformers model and its tokenizer. Out: a `TransformerBridge` around the same weights. Its parts stand in the
model only where a hook is: each computes what the module that it wraps does, but in Python, which takes longer than a
small model's arithmetic.
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
"""A hook's full name, and what is called with the activation there; what it returns, unless None, takes its place."""
ROUNDING = 1e-3
"""Of the largest logit: by so much may another attention kernel move one in fp32."""


class _Seat(NamedTuple):
    """A place in the model, of a module or of the part of the bridge that wraps it."""

    parent: nn.Module
    name: str
    part: Any

    @property
    def is_taken(self) -> bool:
        return self.parent._modules[self.name] is self.part

    def take(self) -> None:
        self.parent._modules[self.name] = self.part

    def leave(self) -> None:
        self.parent._modules[self.name] = self.part.original_component


class _Wiring(NamedTuple):
    """What a bridge has wrapped: hook points by their names, the places of its parts, for each hook point the places
    of the parts that run it, and its blocks."""

    points: dict[str, Any]
    seats: list[_Seat]
    owners: dict[int, list[_Seat]]
    blocks: list[Any]


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformerBridge:
    """Wraps `model` in place; no second copy of the weights is made, and none of them needs a gradient from here on.
    Hooks are then set with `hooked`.

    Raises ModelError where a model in fp32 computes something else than before.
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
    # This switches to eager attention, which is what the bridge's own parts compute, to the last bit.
    with nothing_installed():
        bridge = TransformerBridge.boot_transformers(
            model.config._name_or_path or "local", hf_model=model, tokenizer=tokenizer, device=str(model.device)
        )
    bridge.__dict__["wiring"] = _find_wiring(bridge)
    model.requires_grad_(False)  # while all parts are in place, some of which have copies of weights
    after = _some_logits(model)
    if before is not None:  # in bf16, rounding alone moves logits by a third of the largest
        largest, apart = before.abs().max().item(), (after - before).abs().max().item()
        if not apart <= largest * ROUNDING:
            raise ModelError(
                f"model.source: TransformerLens' bridge changes what a model of the architecture "
                f"{model.config.model_type} computes (logits up to {largest:.3g} differ by {apart:.3g}), so it cannot "
                "be looked at"
            )
    _leave_seats(bridge, after)
    return bridge


def _leave_seats(bridge: TransformerBridge, logits: Tensor) -> None:
    """Takes the bridge's parts out of its model where that changes no bit of `logits`, neither without hooks nor with
    hooks in every block, and each of these hooks still runs. Else all stay: a LayerNorm, for one, is not computed in
    torch's order by the bridge."""
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
        seat.leave()
    try:
        alone = _some_logits(model)
        with hooked(bridge, [(name, note(name)) for name in sorted(names)]):
            beside = _some_logits(model)
        same = torch.equal(alone, logits) and torch.equal(beside, logits) and seen == names
    except Exception:  # whatever a pass without them may raise, with them it works
        same = False
    if not same:
        for seat in _wiring(bridge).seats:
            seat.take()


@contextmanager
def hooked(bridge: TransformerBridge, hooks: Sequence[Hook]) -> Iterator[None]:
    """Runs `hooks`, pairs of a hook's name and a function (activation, hook), in every pass inside the `with`.

    The bridge's own `hooks` would find no part in place, and looks all names up again, which takes milliseconds. For
    these and its other methods, put all parts in place with `whole`.
    Raises KeyError for a name that is none of `hook_names`.
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
    """All names that a hook can have."""
    return _wiring(bridge).points.keys()


@contextmanager
def whole(bridge: TransformerBridge) -> Iterator[None]:
    """Every part of the bridge is in place inside the `with`, as TransformerLens leaves it."""
    with _seated(_wiring(bridge).seats):
        yield


@contextmanager
def _seated(seats: Sequence[_Seat]) -> Iterator[None]:
    ours = []
    for seat in seats:
        if not seat.is_taken:
            seat.take()
            ours.append(seat)
    try:
        yield
    finally:
        for seat in ours:
            seat.leave()


def block_of(bridge: TransformerBridge, layer: int) -> Any:
    """The bridge's part that wraps a layer's block, in place or not."""
    return _wiring(bridge).blocks[layer]


def _wiring(bridge: TransformerBridge) -> _Wiring:
    return bridge.__dict__["wiring"]


def _find_wiring(bridge: TransformerBridge) -> _Wiring:
    """As TransformerLens has wired the bridge, with all parts in place."""
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

"""The model wrapped for TransformerLens, and its hooks.

In: a transformers model and its tokenizer. Out: a `TransformerBridge` around the same weights. Its components are in
the model only where a hook needs them: each computes the same as the module that it wraps, but in Python, which takes
longer than a small model's arithmetic. Where torch's own hooks on the model's modules see the same bits, they are used.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from data.rows import one_line
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


class _Slot(NamedTuple):
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


class _ModuleHook(NamedTuple):
    """A hook point without the bridge: the model's own module, and which of its tensors is meant."""

    part: Any
    """The component that owns the hook point, and wraps the module."""
    at: str
    """`hook_in`, `hook_out`, or `hook_normalized`: the input of a norm, normalised but without gain."""

    def add(self, run: Callable[[Tensor, object], Tensor | None]) -> Any:
        """Calls `run` there in every pass, as a hook of the bridge would be; returns torch's handle."""
        module: nn.Module = self.part.original_component

        def on_input(module: nn.Module, inputs: tuple) -> tuple | None:
            replaced = run(inputs[0], module)
            return None if replaced is None else (replaced, *inputs[1:])

        def on_output(module: nn.Module, inputs: tuple, output: Any) -> Any:
            is_tuple = isinstance(output, tuple)
            replaced = run(output[0] if is_tuple else output, module)
            if replaced is None:
                return None
            return (replaced, *output[1:]) if is_tuple else replaced

        def on_norm(module: nn.Module, inputs: tuple, output: Any) -> None:
            if run(self._normalised(inputs[0]), module) is not None:
                raise ValueError("a norm's normalised input can be read, not replaced")

        if self.at == "hook_in":
            return module.register_forward_pre_hook(on_input)
        return module.register_forward_hook(on_output if self.at == "hook_out" else on_norm)

    def _normalised(self, x: Tensor) -> Tensor:
        """What TransformerLens shows at `hook_normalized`, by the same operations."""
        x = x.double() if x.element_size() == 8 else x.float()
        if not self.part.uses_rms_norm:
            x = x - x.mean(-1, keepdim=True)
        norm = self.part.original_component
        eps: Any = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
        return x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt()


class _Wiring(NamedTuple):
    """How a bridge is wired: hook points by name, the places of its components, for each hook point the places of the
    components that run it, its blocks, and the hook points that need none of its components."""

    points: dict[str, Any]
    slots: list[_Slot]
    owners: dict[int, list[_Slot]]
    blocks: list[Any]
    module_hooks: dict[str, _ModuleHook]
    on_modules: list[Sequence[Hook]]
    """The hooks that are active on modules, outermost first."""


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformerBridge:
    """Wraps `model` in place and turns the gradients of its weights off. Set hooks with `hooked`. On a CPU many rows
    compute from copies of the weights (`models.packed`), made as they are needed.

    Raises ModelError if wrapping changes what an fp32 model computes.
    """
    import torch
    from transformer_lens.model_bridge import TransformerBridge

    from models.packed import pack

    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    before = _some_logits(model) if model.dtype == torch.float32 else None
    if before is not None and not torch.isfinite(before).all():
        raise ModelError(
            f"model.source: the logits of {model.config._name_or_path or 'the model'} are not finite numbers: its "
            "weights hold NaN or infinite values, or values too large for fp32"
        )
    # This switches to eager attention, which the bridge's own components match to the last bit.
    try:
        with nothing_installed():
            bridge = TransformerBridge.boot_transformers(
                model.config._name_or_path or "local", hf_model=model, tokenizer=tokenizer, device=str(model.device)
            )
        bridge.__dict__["wiring"] = _find_wiring(bridge)
        model.requires_grad_(False)  # while all components are attached, because some have copies of weights
        after = _some_logits(model)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
        if any(word in str(error) for word in ("memory", "CUDA", "CUBLAS")):
            raise  # the fault of the machine
        raise ModelError(
            f"model.source: TransformerLens' bridge cannot run this model of the architecture "
            f"{model.config.model_type} ({one_line(error)}), so it is not supported"
        ) from error
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
    pack(model)
    return bridge


def _blocks_give_tuples(bridge: TransformerBridge) -> bool:
    tuples: list[bool] = []
    blocks: Any = bridge.blocks
    handle = blocks[0].register_forward_hook(lambda module, inputs, output: tuples.append(isinstance(output, tuple)))
    _some_logits(bridge.original_model)  # type: ignore[arg-type]
    handle.remove()
    return tuples[0]


def as_block_output(bridge: TransformerBridge, stream: Tensor) -> Tensor | tuple[Tensor]:
    """A stream in the form in which this model's blocks return it: by itself, or first in a tuple."""
    return (stream,) if bridge.__dict__["tuples"] else stream


def _detach_all(bridge: TransformerBridge, logits: Tensor) -> None:
    """Detaches the bridge's components from its model if that changes no bit of `logits`, neither without hooks nor
    with hooks in every block, and each of these hooks still runs. Otherwise all stay attached: the bridge does not
    compute a LayerNorm in torch's order, for example.

    A hook point is served by the model's own module from then on if torch's hook there sees the same bits.
    """
    import torch

    model: Any = bridge.original_model
    wiring = _wiring(bridge)
    kinds = dict.fromkeys([*KINDS.values(), *READINGS.values()])
    sites = [Site(layer, kind) for layer in range(bridge.cfg.n_layers) for kind in kinds]
    available = set(hook_names(bridge))
    names = {name for site in sites for name in (site.reads, *site.writes(available), f"blocks.{site.layer}.hook_out")}
    names &= available

    def hooks(activations: dict[str, Tensor]) -> list[Hook]:
        def note(name: str) -> Callable:
            return lambda activation, hook: activations.update({name: activation.flatten(2).clone()})

        return [(name, note(name)) for name in sorted(names)]

    by_bridge: dict[str, Tensor] = {}
    for slot in wiring.slots:
        slot.detach()
    try:
        unhooked = _some_logits(model)
        with hooked(bridge, hooks(by_bridge)):
            with_hooks = _some_logits(model)
        agrees = torch.equal(unhooked, logits) and torch.equal(with_hooks, logits) and by_bridge.keys() == names
    except Exception:  # whatever a pass without the components raises, with them it works
        agrees = False
    if not agrees:
        for slot in wiring.slots:
            slot.attach()
        return
    by_torch: dict[str, Tensor] = {}
    module_hooks = {name: place for name in names if (place := _module_hook_of(wiring, name)) is not None}
    try:
        with _on_modules([(module_hooks[name], run) for name, run in hooks(by_torch) if name in module_hooks]):
            _some_logits(model)
    except Exception:  # a module that is called or built in another way than these hooks expect
        return
    wiring.module_hooks.update(
        (name, place)
        for name, place in module_hooks.items()
        if name in by_torch and torch.equal(by_torch[name], by_bridge[name])
    )


def _module_hook_of(wiring: _Wiring, name: str) -> _ModuleHook | None:
    """The hook on a module for a hook point that one component runs, if its name says where in the component."""
    point = wiring.points[name]
    slots = wiring.owners.get(id(point), [])
    at = [name for slot in slots for name, child in slot.part.named_children() if child is point]
    if len(at) != 1 or at[0] not in ("hook_in", "hook_out", "hook_normalized"):
        return None
    return _ModuleHook(slots[0].part, at[0])


@contextmanager
def _on_modules(
    module_hooks: Sequence[tuple[_ModuleHook, Callable[[Tensor, object], Tensor | None]]],
) -> Iterator[None]:
    handles: list[Any] = []
    try:
        handles += (place.add(run) for place, run in module_hooks)
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def hooked(bridge: TransformerBridge, hooks: Sequence[Hook]) -> Iterator[None]:
    """Runs `hooks`, pairs of a hook's name and a function (activation, hook), in every pass inside the `with`.

    Where the model's own modules serve all names and no component is attached, these are torch's hooks; heads are then
    flattened. The bridge's own `hooks` needs its components attached, and looks all names up again, which takes
    milliseconds. For that and its other methods, attach all components with `whole`.
    Raises KeyError for a name that is not one of `hook_names`.
    """
    wiring = _wiring(bridge)
    if all(name in wiring.module_hooks for name, _ in hooks) and not any(slot.is_attached for slot in wiring.slots):

        def unless_moved(run: Callable[[Tensor, object], Tensor | None]) -> Callable[[Tensor, object], Tensor | None]:
            return lambda activation, hook: run(activation, hook) if any(hooks is entry for entry in active) else None

        active = wiring.on_modules
        with _on_modules([(wiring.module_hooks[name], unless_moved(run)) for name, run in hooks]):
            active.append(hooks)
            try:
                yield
            finally:
                active.pop()
        return
    # A part whose hook changes something need not run its module, so the hooks around these move to the parts.
    outer_hooks = list(wiring.on_modules)
    all_hooks = [hook for group in (*outer_hooks, hooks) for hook in group]
    points = [wiring.points[name] for name, _ in all_hooks]
    with _attached([slot for point in points for slot in wiring.owners.get(id(point), wiring.slots)]):
        handles = []
        wiring.on_modules.clear()
        try:
            for point, (_, run) in zip(points, all_hooks, strict=True):
                handles.append((point, point.add_hook(run)))
            yield
        finally:
            wiring.on_modules.extend(outer_hooks)
            for point, handle in handles:
                handle.hook.remove()
                point.fwd_hooks.remove(handle)


def hook_names(bridge: TransformerBridge) -> Collection[str]:
    """The names of all hooks."""
    return _wiring(bridge).points.keys()


def unhooked_norms(bridge: TransformerBridge) -> list[str]:
    """The names of the model's norms whose denominators no hook shows."""
    from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent

    shown = {id(slot.part.original_component) for slot in _wiring(bridge).slots if hasattr(slot.part, "hook_scale")}
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
    with _attached(_wiring(bridge).slots):
        yield


@contextmanager
def _attached(slots: Sequence[_Slot]) -> Iterator[None]:
    attached = []
    for slot in slots:
        if not slot.is_attached:
            slot.attach()
            attached.append(slot)
    try:
        yield
    finally:
        for slot in attached:
            slot.detach()


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
    slots = [
        _Slot(parent, name, part)
        for parent in model.modules()
        if not isinstance(parent, GeneralizedComponent)
        for name, part in parent._modules.items()
        if isinstance(part, GeneralizedComponent) and part.original_component is not None
    ]
    owners: dict[int, list[_Slot]] = {}
    for slot in slots:
        for child in slot.part.children():
            if isinstance(child, HookPoint):
                owners.setdefault(id(child), []).append(slot)
    return _Wiring(dict(bridge.hook_dict), slots, owners, list(bridge.blocks), {}, [])  # type: ignore[arg-type]


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

"""What lies between what a site reads and what it writes: the hooks there, and the block's own path as plain modules.

In: a TransformerBridge, which says where an architecture keeps the parts of a block, and the folder of a model of that
architecture. Out: hooks that read and write at a site, and for each site a `BlockPath`: its norm's gain, its MLP, and
the norm after the MLP if any. This is the one file that knows how blocks are built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.bridge import Hook, block_of, hook_names
from models.errors import ModelError
from models.weights import build_skeleton, open_weights
from sites import MLP, Site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

PARTS = MLP.parts
"""The bridge's names of what lies on the path; Gemma-2 has all three."""


def hooks_at(
    site: Site,
    read: Callable[[Tensor], None] | None = None,
    write: Callable[[Tensor], Tensor | None] | None = None,
) -> list[Hook]:
    """Hooks for `models.bridge.hooked` at one site. In a pass, `read` is called with x (batch, position, d_in) as a
    transcoder reads it, then `write` with y (batch, position, d_out); what that returns takes y's place, unless None.

    Heads are flattened, whatever shape the model has there. This is the only place that turns what a hook holds into
    what a transcoder reads.
    """
    hooks: list[Hook] = []
    if read is not None:

        def on_read(activation: Tensor, hook: object) -> None:
            x = activation.flatten(2)
            read(x / x.shape[-1] ** 0.5 if site.kind.scaled else x)

        hooks.append((site.reads, on_read))
    if write is not None:
        (written,) = site.writes  # several are parts of one y, which no kind has yet

        def on_write(activation: Tensor, hook: object) -> Tensor | None:
            edited = write(activation.flatten(2))
            return None if edited is None else edited.reshape(activation.shape)

        hooks.append((written, on_write))
    return hooks


def widths(bridge: TransformerBridge, site: Site) -> tuple[int, int]:
    """d_in and d_out of a site of this model: an MLP reads and writes the residual stream's width."""
    return bridge.cfg.d_model, bridge.cfg.d_model


def check_hooks(bridge: TransformerBridge, site: Site) -> None:
    """Raises ModelError where this model lacks the layer, or what the site reads or writes there."""
    for name in (site.reads, *site.writes):
        if name not in hook_names(bridge):
            raise ModelError(f"layer {site.label}: this model has no {name}, which the transcoder needs")


@dataclass(frozen=True)
class BlockPath:
    """What a block makes of x at `ln2.hook_normalized`: `post(mlp(x * gain + bias))`, its `hook_mlp_out`."""

    site: Site
    norm: nn.Module
    mlp: nn.Module
    post: nn.Module | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """(..., d_out), in the dtype of the weights."""
        inner = x.to(self.gain.dtype) * self.gain
        output = self.mlp(inner if self.bias is None else inner + self.bias)
        return output if self.post is None else self.post(output)

    @property
    def gain(self) -> Tensor:
        """What the norm multiplies its normalised input with, (d_model,): 1 + weight in Gemma and Nemotron."""
        weight: Any = self.norm.weight
        name = type(self.norm).__name__
        return weight + 1 if "Gemma" in name or name.endswith("1P") else weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self.norm, "bias", None)

    @property
    def d_in(self) -> int:
        return len(self.gain)

    @cached_property
    def d_out(self) -> int:
        with torch.no_grad():  # by what comes out: MLPs keep their last projection under many names
            return self(self.gain.new_zeros(1, self.d_in)).shape[-1]

    def parameters(self) -> dict[str, nn.Parameter]:
        """By part and name, such as `mlp.up_proj.weight`."""
        parts = zip(PARTS, (self.norm, self.mlp, self.post), strict=True)
        return {
            f"{part}.{name}": parameter
            for part, module in parts
            if module is not None
            for name, parameter in module.named_parameters()
        }

    def to(self, device: str | torch.device) -> BlockPath:
        """The same path on `device`; its modules are moved in place."""
        for module in (self.norm, self.mlp, self.post):
            if module is not None:
                module.to(device)
        return self


def read_paths(
    bridge: TransformerBridge, folder: Path, sites: Sequence[Site], dtype: torch.dtype | None = None
) -> dict[Site, BlockPath]:
    """The paths of the model in `folder`, on the bridge's device, in its dtype or in `dtype`.

    Only the tensors of those sites are read. Raises ModelError where the folder lacks one or its shape differs.
    """
    skeleton = build_skeleton(folder)
    weights = open_weights(folder, skeleton=skeleton)
    paths = {}
    for site in sites:
        parts, places = _parts(bridge, site.layer), part_places(skeleton.config, site.layer)
        modules = {part: skeleton.get_submodule(place) for part, place in places.items()}
        names = {
            f"{place}.{name}": (part, name)
            for part, place in places.items()
            for name, _ in modules[part].named_parameters()
        }
        found = weights.read(names)
        states: dict[str, dict[str, Tensor]] = {part: {} for part in parts}
        for full, (part, name) in names.items():
            ours = _plain_parameters(parts[part])[name]
            if found[full].shape != ours.shape:
                raise ModelError(f"{folder}: {full} is {tuple(found[full].shape)}, expected {tuple(ours.shape)}")
            states[part][name] = found[full].to(ours.device, dtype or ours.dtype)
        for part, module in modules.items():
            module.load_state_dict(states[part], assign=True)
            module.eval().requires_grad_(False)
        paths[site] = BlockPath(site, modules["ln2"], modules["mlp"], modules.get("ln2_post"))
    return paths


def part_places(config: Any, layer: int) -> dict[str, str]:
    """Where a plain model of this transformers config keeps each part of a layer's path, such as `model.layers.3.mlp`:
    TransformerLens knows, without a model. Empty for an architecture that it does not know."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
    from transformers import AutoModelForCausalLM

    name = AutoModelForCausalLM._model_mapping[type(config)].__name__  # type: ignore[attr-defined]
    try:
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(
            build_bridge_config_from_hf(config, name, "local", torch.float32)
        )
    except (ValueError, KeyError):
        return {}
    blocks: Any = (adapter.component_mapping or {}).get("blocks")
    inner = blocks.submodules if blocks is not None else {}
    return {part: f"{blocks.name}.{layer}.{inner[part].name}" for part in PARTS if part in inner}


def layers_on_path(config: Any, names: Iterable[str]) -> list[int]:
    """The layers whose path holds one of these parameters or modules, ascending."""
    changed = [f"{name}." for name in names]
    found = []
    for layer in range(config.num_hidden_layers):
        places = tuple(f"{place}." for place in part_places(config, layer).values())
        if any(name.startswith(places) for name in changed):
            found.append(layer)
    return found


@contextmanager
def exchanged(bridge: TransformerBridge, paths: Sequence[BlockPath]) -> Iterator[None]:
    """The bridge runs with the weights of `paths` while the `with` lasts, and `paths` hold the bridge's.

    Tensors change places, none is copied, so this costs nothing and every strength can be a row of one batch.
    """
    held = [(_own(bridge, path.site.layer), path.parameters()) for path in paths]
    _exchange(held)
    try:
        yield
    finally:
        _exchange(held)


@contextmanager
def interpolated(bridge: TransformerBridge, paths: Sequence[BlockPath], alpha: float) -> Iterator[None]:
    """The bridge runs with weights `W + alpha (W' - W)`, W of `paths` and W' its own, while the `with` lasts."""
    held: list[tuple[dict[str, nn.Parameter], dict[str, Tensor]]] = []
    for path in paths:
        ours, starts = _own(bridge, path.site.layer), path.parameters()
        held.append((ours, {name: ours[name].data for name in starts}))
        for name, start in starts.items():
            ours[name].data = torch.lerp(start.data, ours[name].data, alpha)
        _split(ours)
    try:
        yield
    finally:
        for ours, before in held:
            for name, data in before.items():
                ours[name].data = data
            _split(ours)


def _exchange(held: Sequence[tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]]) -> None:
    for ours, theirs in held:
        for name, other in theirs.items():
            ours[name].data, other.data = other.data, ours[name].data
        _split(ours)


def _own(bridge: TransformerBridge, layer: int) -> dict[str, nn.Parameter]:
    """The bridge's parameters on the path of a layer, such as `mlp.up_proj.weight`."""
    parts = _parts(bridge, layer)
    return {f"{part}.{name}": one for part in parts for name, one in _plain_parameters(parts[part]).items()}


def _split(ours: dict[str, nn.Parameter]) -> None:
    """Where a model has gate and up projection in one weight, the bridge runs with copies of its halves: they follow
    it."""
    for name, joined in ours.items():
        if name.startswith("mlp.gate_up_proj."):
            kind = name.rpartition(".")[2]
            ours[f"mlp.gate.{kind}"].data, ours[f"mlp.in.{kind}"].data = joined.data.chunk(2)


def _parts(bridge: TransformerBridge, layer: int) -> dict[str, Any]:
    """The bridge's components on the path of a layer."""
    block = block_of(bridge, layer)
    found = {part: getattr(block, part, None) for part in PARTS}
    return {part: component for part, component in found.items() if component is not None}


def _plain_parameters(component: nn.Module) -> dict[str, nn.Parameter]:
    return {_plain(name): parameter for name, parameter in component.named_parameters()}


def _plain(name: str) -> str:
    """A parameter's name before wrapping."""
    return name.replace("_original_component.", "")

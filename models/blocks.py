"""The computation between a site's input and its output: the hooks there, and the block's own path as plain modules.

In: a TransformerBridge, which knows where an architecture keeps the parts of a block, and the folder of a model of that
architecture. Out: hooks that read and write at a site, and for each site a `BlockPath` of the modules in between. This
is the only file that knows how blocks are built.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.architectures import kinds_of
from models.bridge import Hook, block_of, hook_names, whole
from models.errors import ModelError
from models.packed import pack
from models.weights import build_skeleton, open_weights
from sites import ATTENTION_OUT, QKV, Kind, Site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Write = Callable[[Tensor, slice], Tensor | None]
"""Takes a part of a site's output, y[..., part] (batch, position, width), where `part` is its slice of y, and returns
its replacement or None. For a site with several outputs it is called once for each, in order."""
JOINT = "attn.qkv"
"""The component in which an architecture keeps queries, keys and values together; the bridge runs with copies of its
parts."""


def hooks_at(
    bridge: TransformerBridge,
    site: Site,
    read: Callable[[Tensor], None] | None = None,
    write: Write | None = None,
    see: Callable[[Tensor], None] | None = None,
) -> list[Hook]:
    """Hooks for `models.bridge.hooked` at one site. In a pass, `read` is called with x (batch, position, d_in) as a
    transcoder reads it, then `write` with y, part by part, and `see` with the unedited y (batch, position, d_out).

    Heads are flattened, whatever shape the model has there. This is the only place that converts a hook's activation to
    a transcoder's input.
    """
    hooks: list[Hook] = []
    if read is not None:

        def on_read(activation: Tensor, hook: object) -> None:
            x = activation.flatten(2)
            read(x / x.shape[-1] ** 0.5 if site.kind.scaled else x)

        hooks.append((site.reads, on_read))
    names = site.writes(hook_names(bridge)) if write is not None or see is not None else ()
    parts: list[Tensor] = []

    def writer(number: int) -> Callable[[Tensor, object], Tensor | None]:
        def on_write(activation: Tensor, hook: object) -> Tensor | None:
            if number == 0:
                parts.clear()
            y = activation.flatten(2)
            before = sum(part.shape[-1] for part in parts)
            parts.append(y)
            if number == len(names) - 1:
                if see is not None:
                    see(y if len(parts) == 1 else torch.cat(parts, dim=-1))
                parts.clear()  # do not keep activations until the next pass
            edited = None if write is None else write(y, slice(before, before + y.shape[-1]))
            return None if edited is None else edited.reshape(activation.shape)

        return on_write

    return hooks + [(name, writer(number)) for number, name in enumerate(names)]


def check_hooks(bridge: TransformerBridge, site: Site) -> None:
    """Raises ModelError if this model lacks the layer, or a hook that the site reads or writes there."""
    available = hook_names(bridge)
    for name in (site.reads, *site.writes(available)):
        if name not in available:
            raise ModelError(f"layer {site.label}: this model has no {name}, which the transcoder needs")


@dataclass(frozen=True)
class BlockPath:
    """A block's computation from a site's input to its output, in the modules of one model, by the bridge's names of
    the parts: for x at `ln2.hook_normalized`, `ln2_post(mlp(x * gain + bias))`; for z, `ln1_post(o(z))`; for x at
    `ln1.hook_normalized`, `q`, `k` and `v` of `x * gain + bias`, concatenated."""

    site: Site
    parts: Mapping[str, nn.Module]
    borrowed: frozenset[str] = frozenset()
    """Parts that are the bridge's own modules: a norm shared by attention and MLP belongs to the rest, not the path."""

    def __call__(self, x: Tensor) -> Tensor:
        """(..., d_out), in the dtype of the weights."""
        parts, kind = self.parts, self.site.kind.name
        x = x.to(self._some_weight.dtype)
        if kind == QKV.name:
            normed = self._normed(x)
            return torch.cat([parts[part](normed) for part in ("attn.q", "attn.k", "attn.v")], dim=-1)
        y = parts["attn.o"](x) if kind == ATTENTION_OUT.name else parts["mlp"](self._normed(x))
        post = parts.get("ln1_post" if kind == ATTENTION_OUT.name else "ln2_post")
        return y if post is None else post(y)

    def _normed(self, x: Tensor) -> Tensor:
        """The norm's output for a normalised x."""
        normed = x * self.gain
        return normed if self.bias is None else normed + self.bias

    @property
    def _norm(self) -> Any:
        return self.parts["ln1" if self.site.kind.name == QKV.name else "ln2"]

    @property
    def gain(self) -> Tensor:
        """What the norm multiplies its normalised input with, (d_model,): 1 + weight in Gemma 2 and Nemotron, say."""
        weight = self._norm.weight
        return weight + 1 if _adds_one(self._norm) else weight

    @property
    def bias(self) -> Tensor | None:
        return getattr(self._norm, "bias", None)

    @property
    def is_linear(self) -> bool:
        """Whether y, and so also what finetuning changed, is an affine function of x."""
        return is_linear(self.site.kind, self.parts)

    @torch.no_grad()
    def as_map(self) -> tuple[Tensor, Tensor]:
        """A linear path as x W + b: W (d_in, d_out) and b (d_out,), fp64."""
        exact = replace(self, parts={part: deepcopy(module).double() for part, module in self.parts.items()})
        zero = exact._some_weight.new_zeros(1, self.d_in)
        b = exact(zero)
        return exact(torch.eye(self.d_in).to(zero)) - b, b[0]

    @cached_property
    def d_in(self) -> int:
        if self.site.kind.name != ATTENTION_OUT.name:
            return len(self.gain)
        projection: Any = self.parts["attn.o"]
        return projection.in_features if isinstance(projection, nn.Linear) else projection.weight.shape[0]

    @cached_property
    def d_out(self) -> int:
        with torch.no_grad():  # by running it, because architectures name the projections differently
            return self(self._some_weight.new_zeros(1, self.d_in)).shape[-1]

    @cached_property
    def widths(self) -> list[int]:
        """The widths of the parts of y: of queries, keys and values; for other sites only d_out."""
        if self.site.kind.name != QKV.name:
            return [self.d_out]
        with torch.no_grad():
            zeros = self._some_weight.new_zeros(1, self.d_in)
            return [self.parts[part](zeros).shape[-1] for part in ("attn.q", "attn.k", "attn.v")]

    @property
    def _some_weight(self) -> Tensor:
        return next(iter(self.parameters().values()))

    def parameters(self) -> dict[str, nn.Parameter]:
        """By part and name, such as `mlp.up_proj.weight`."""
        return {
            f"{part}.{name}": parameter
            for part, module in self.parts.items()
            if part not in self.borrowed
            for name, parameter in module.named_parameters()
        }

    def only(self, parts: Collection[str]) -> BlockPath:
        """Only these parts: not a path that can be run, but weights to exchange."""
        return replace(self, parts={part: module for part, module in self.parts.items() if part in parts})

    def to(self, device: str | torch.device) -> BlockPath:
        """The same path on `device`; its modules are moved in place."""
        for part, module in self.parts.items():
            if part not in self.borrowed:
                module.to(device)
        return self


def is_linear(kind: Kind, parts: Collection[str]) -> bool:
    """Whether a path of these parts is an affine function: projections without a norm after them."""
    return kind.name == QKV.name or (kind.name == ATTENTION_OUT.name and "ln1_post" not in parts)


def linear_kinds(config: Any) -> list[Kind]:
    """The kinds of site that are affine functions in this architecture."""
    kinds = kinds_of(config.model_type)
    return [kind for kind in kinds if is_linear(kind, part_places(config, Site(0, kind)))]


def read_paths(
    bridge: TransformerBridge, folder: Path, sites: Sequence[Site], dtype: torch.dtype | None = None
) -> dict[Site, BlockPath]:
    """The paths of the model in `folder`, on the bridge's device, in its dtype or in `dtype`.

    Only the tensors of those sites are read. Raises ModelError if the folder lacks one or its shape differs.
    """
    skeleton = build_skeleton(folder)
    weights, blocks = open_weights(folder, skeleton=skeleton), _mapped_blocks(skeleton.config)
    paths = {}
    for site in sites:
        parts, places = _parts(bridge, site), _places(blocks, site)
        modules = {part: skeleton.get_submodule(place) for part, place in places.items()}
        names = {
            f"{place}.{name}": (part, name)
            for part, place in places.items()
            for name, _ in modules[part].named_parameters()
        }
        tensors = weights.read(names)
        states: dict[str, dict[str, Tensor]] = {part: {} for part in modules}
        for full, (part, name) in names.items():
            target = _plain_parameters(parts[part])[name]
            if tensors[full].shape != target.shape:
                raise ModelError(f"{folder}: {full} is {tuple(tensors[full].shape)}, expected {tuple(target.shape)}")
            states[part][name] = tensors[full].to(target.device, dtype or target.dtype)
        for part, module in modules.items():
            module.load_state_dict(states[part], assign=True)
        if JOINT in modules:  # in halves and thirds as TransformerLens cuts them
            attention: Any = block_of(bridge, site.layer).attn
            joint = skeleton.get_submodule(places[JOINT].rpartition(".")[0])
            modules |= dict(zip(("attn.q", "attn.k", "attn.v"), attention.split_qkv_matrix(joint), strict=True))
        for module in modules.values():
            module.eval().requires_grad_(False)
        borrowed = {part: parts[part].original_component for part in ("ln1",) if part in parts and part not in modules}
        paths[site] = BlockPath(site, modules | borrowed, frozenset(borrowed))
    pack(*(module for path in paths.values() for module in path.parts.values()))
    return paths


def output_of_heads(bridge: TransformerBridge, layer: int) -> BlockPath | None:
    """The path from z to attention's output in the model's own modules, not copies; None if the bridge does not know
    its output projection."""
    parts = _parts(bridge, Site(layer, ATTENTION_OUT))
    modules = {part: getattr(component, "original_component", None) for part, component in parts.items()}
    if modules.get("attn.o") is None:
        return None
    present = {part: module for part, module in modules.items() if module is not None}
    return BlockPath(Site(layer, ATTENTION_OUT), present)


def part_places(config: Any, site: Site) -> dict[str, str]:
    """The module path of each part of a site's path in a plain model of this transformers config, such as
    `model.layers.3.mlp`, from TransformerLens and without a model. Empty for an architecture that it does not know."""
    return _places(_mapped_blocks(config), site)


def _places(blocks: Any, site: Site) -> dict[str, str]:
    """`part_places` for a known map of the blocks."""
    places = {}
    for part in site.kind.parts if blocks is not None else ():
        component, place = blocks, f"{blocks.name}.{site.layer}"
        for step in part.split("."):
            component = component.submodules.get(step) if component is not None else None
            place = f"{place}.{component.name}" if component is not None else place
        if component is not None and component.name:
            places[part] = place
    if "ln2" not in (blocks.submodules if blocks is not None else ()):
        places.pop("ln1", None)  # the MLP reads this norm too
    if JOINT in places:  # its parts are no modules
        places = {part: place for part, place in places.items() if part not in ("attn.q", "attn.k", "attn.v")}
    return places


def _mapped_blocks(config: Any) -> Any:
    """TransformerLens' map of the blocks of this architecture; None if it does not know it."""
    from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
    from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_config_from_hf
    from transformers import AutoModelForCausalLM

    name = AutoModelForCausalLM._model_mapping[type(config)].__name__  # type: ignore[attr-defined]
    try:
        adapter = ArchitectureAdapterFactory.select_architecture_adapter(
            build_bridge_config_from_hf(config, name, "local", torch.float32)
        )
    except (ValueError, KeyError):
        return None
    return (adapter.component_mapping or {}).get("blocks")


_ADDS_ONE: dict[type[nn.Module], bool] = {}


def _adds_one(norm: Any) -> bool:
    """Whether a norm multiplies its normalised input with 1 + weight rather than weight, seen from what it computes,
    once for each class. Raises ModelError if it does neither."""
    kind = type(norm)
    if kind not in _ADDS_ONE:
        with torch.no_grad():
            weight = norm.weight.detach().float()
            x = torch.ones_like(weight)  # alternating and of mean square 1: normalised already, with a mean or without
            x[1::2] = -1
            bias = getattr(norm, "bias", None)
            y = norm(x.to(norm.weight.dtype)).float() - (0 if bias is None else bias.float())
            apart = [((y - x * gain).abs() / (1 + gain.abs())).mean().item() for gain in (weight, weight + 1)]
        if not min(apart) < 0.05:
            raise ModelError(f"the norm {kind.__name__} multiplies with neither its weight nor 1 + weight")
        _ADDS_ONE[kind] = apart[1] < apart[0]
    return _ADDS_ONE[kind]


def sites_with(config: Any, names: Iterable[str]) -> tuple[list[Site], list[str]]:
    """The sites whose path contains one of these parameters or modules, in order, and the names that are on no path."""
    changed, blocks = {name: f"{name}." for name in names}, _mapped_blocks(config)
    sites, owned = [], set()
    kinds = kinds_of(config.model_type)
    for site in (Site(layer, kind) for layer in range(config.num_hidden_layers) for kind in kinds):
        places = tuple(f"{place}." for place in _places(blocks, site).values())
        # A name may be of a part, or of a module that holds the part, such as all of attention.
        site_names = {
            name
            for name, ended in changed.items()
            if ended.startswith(places) or any(place.startswith(ended) for place in places)
        }
        owned |= site_names
        sites += [site] if site_names else []
    return sites, [name for name in changed if name not in owned]


@contextmanager
def exchanged(bridge: TransformerBridge, paths: Sequence[BlockPath]) -> Iterator[None]:
    """Inside the `with`, the bridge runs with the weights of `paths`, and `paths` hold the bridge's.

    Tensors are swapped, not copied, so this costs nothing and every strength can be a row of one batch.
    """
    pairs = [(_own(bridge, path.site), path.parameters()) for path in paths]
    # If a joint weight stays and only copies of its parts change, the model's own module would not use them.
    copies = any(_has_copies_alone(bridge, path) for path in paths)
    with whole(bridge) if copies else nullcontext():
        _exchange(pairs)
        try:
            yield
        finally:
            _exchange(pairs)


def differs(bridge: TransformerBridge, path: BlockPath) -> bool:
    """Whether any weight of `path` differs from the bridge's own."""
    bridge_parameters = _own(bridge, path.site)
    return any(not torch.equal(bridge_parameters[name], parameter) for name, parameter in path.parameters().items())


@contextmanager
def interpolated(bridge: TransformerBridge, paths: Sequence[BlockPath], alpha: float) -> Iterator[None]:
    """Inside the `with`, the bridge runs with weights `W + alpha (W' - W)`, W of `paths` and W' its own."""
    originals: list[tuple[dict[str, nn.Parameter], dict[str, Tensor]]] = []
    try:  # from the first change on: memory may run out at the second
        for path in paths:
            bridge_parameters, starts = _own(bridge, path.site), path.parameters()
            originals.append((bridge_parameters, {name: bridge_parameters[name].data for name in starts}))
            for name, start in starts.items():
                bridge_parameters[name].data = torch.lerp(start.data, bridge_parameters[name].data, alpha)
            _split(bridge_parameters)
        yield
    finally:
        for bridge_parameters, before in originals:
            for name, data in before.items():
                bridge_parameters[name].data = data
            _split(bridge_parameters)


def _exchange(pairs: Sequence[tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]]) -> None:
    for bridge_parameters, path_parameters in pairs:
        for name, parameter in path_parameters.items():
            bridge_parameters[name].data, parameter.data = parameter.data, bridge_parameters[name].data
        _split(bridge_parameters)


def _has_copies_alone(bridge: TransformerBridge, path: BlockPath) -> bool:
    copies = [part for part in path.parts if part in ("attn.q", "attn.k", "attn.v")]
    return bool(copies) and JOINT not in path.parts and JOINT in _parts(bridge, path.site)


def _own(bridge: TransformerBridge, site: Site) -> dict[str, nn.Parameter]:
    """The bridge's parameters on the path of a site, such as `mlp.up_proj.weight`."""
    parts = _parts(bridge, site)
    return {f"{part}.{name}": weight for part in parts for name, weight in _plain_parameters(parts[part]).items()}


def _split(bridge_parameters: dict[str, nn.Parameter]) -> None:
    """If a model keeps gate and up projection in one weight, the bridge runs with copies of its halves; this updates
    them."""
    for name, joined in bridge_parameters.items():
        if name.startswith("mlp.gate_up_proj."):
            kind = name.rpartition(".")[2]
            bridge_parameters[f"mlp.gate.{kind}"].data, bridge_parameters[f"mlp.in.{kind}"].data = joined.data.chunk(2)


def _parts(bridge: TransformerBridge, site: Site) -> dict[str, Any]:
    """The bridge's components on the path of a site."""
    parts = {}
    for part in site.kind.parts:
        component: Any = block_of(bridge, site.layer)
        for step in part.split("."):
            component = getattr(component, step, None)
        if component is not None:
            parts[part] = component
    return parts


def _plain_parameters(component: nn.Module) -> dict[str, nn.Parameter]:
    return {_plain(name): parameter for name, parameter in component.named_parameters()}


def _plain(name: str) -> str:
    """A parameter's name before wrapping."""
    return name.replace("_original_component.", "")

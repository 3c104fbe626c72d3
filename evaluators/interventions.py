"""Interventions: what replaces a layer's MLP output, and the hooks that do it.

In: a TransformerBridge, the sites (layer, base, delta) and a condition's name. Out: a context in which every forward
pass of the model is edited, prompt and generated tokens alike, BOS and padding never. A new condition is one entry of
`CONDITIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.bridge import read_input, tap_names
from models.errors import ModelError
from models.transcoder import Transcoder, check_fits

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Site:
    """One layer where transcoders are spliced in. Raises ModelError where they are not of one kind and layer."""

    layer: int
    base: Transcoder
    delta: Transcoder | None = None

    def __post_init__(self) -> None:
        if self.base.layer != self.layer:
            raise ModelError(f"layer {self.layer}: the base transcoder is of layer {self.base.layer}")
        if self.delta is None:
            return
        d_model, taps = self.base.d_model, self.base.taps
        check_fits(self.delta, d_model=d_model, n_layers=self.layer + 1, taps=taps, origin=f"layer {self.layer}: delta")
        if self.delta.layer != self.layer:
            raise ModelError(f"layer {self.layer}: the delta transcoder is of layer {self.delta.layer}")

    def to(self, device: str | torch.device) -> Site:
        return Site(self.layer, self.base.to(device), None if self.delta is None else self.delta.to(device))


@dataclass(frozen=True)
class Condition:
    """How an MLP's output y is replaced: `combine(y, base(x), delta(x), alpha)`, each (tokens, d_model) in fp32, alpha
    (tokens, 1)."""

    name: str
    answers: str
    combine: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
    uses_delta: bool = True


CONDITIONS = {
    condition.name: condition
    for condition in (
        Condition("no_delta", "base alone", lambda y, base, delta, alpha: base, uses_delta=False),
        Condition("full", "base and delta", lambda y, base, delta, alpha: base + delta),
        Condition("alpha", "dose-response", lambda y, base, delta, alpha: base + alpha * delta),
        Condition("error_term", "must equal raw", lambda y, base, delta, alpha: base + (y - base), uses_delta=False),
        Condition("true_output", "must equal raw exactly", lambda y, base, delta, alpha: y, uses_delta=False),
        Condition(
            "zero_ablation", "the MLP's share", lambda y, base, delta, alpha: torch.zeros_like(y), uses_delta=False
        ),
    )
}
"""Every condition but `raw`, which edits nothing."""


class Splice:
    """The state of an edit while it is active.

    Before each forward pass the caller says with `reset` which tokens are replaced and how strong each row's delta is.
    With `record`, `base_acts` and `delta_acts` (batch,) are then the sums of |activation| over those tokens and all
    sites.
    """

    def __init__(self, sites: Sequence[Site], condition: Condition, record: bool) -> None:
        self.sites, self.condition, self.record = sites, condition, record
        self._inputs: dict[int, Tensor] = {}

    def reset(self, editable: Tensor, alpha: Tensor) -> None:
        """Prepares for a forward pass over a chunk: `editable` (batch, chunk) is True where a token is replaced, and
        `alpha` (batch,) is the strength of each row."""
        self._where = editable.nonzero(as_tuple=True)
        self._alpha = alpha[self._where[0]].unsqueeze(1)
        self.base_acts = torch.zeros(len(editable), device=editable.device)
        self.delta_acts = torch.zeros(len(editable), device=editable.device)

    def hooks(self) -> list[tuple[str, Callable]]:
        """(hook name, function) pairs that make the edit."""
        pairs: list[tuple[str, Callable]] = []
        for site in self.sites:
            read, write = tap_names(site.base.taps, site.layer)
            pairs += [(read, self._reader(site)), (write, self._writer(site))]
        return pairs

    def _reader(self, site: Site) -> Callable:
        def read(x: Tensor, hook: object) -> None:
            self._inputs[site.layer] = read_input(site.base.taps, x)

        return read

    def _writer(self, site: Site) -> Callable:
        def write(y: Tensor, hook: object) -> Tensor:
            x = self._inputs.pop(site.layer)[self._where]
            base_acts = site.base.encode(x)
            base = site.base.decode(base_acts)
            self._note(self.base_acts, base_acts)
            delta = torch.zeros_like(base)
            if self.condition.uses_delta and site.delta is not None:
                delta_acts = site.delta.encode(x)
                delta = site.delta.decode(delta_acts)
                self._note(self.delta_acts, delta_acts)
            replaced = self.condition.combine(y[self._where].float(), base, delta, self._alpha)
            edited = y.clone()
            edited[self._where] = replaced.to(y.dtype)
            return edited

        return write

    def _note(self, sums: Tensor, acts: Tensor) -> None:
        if self.record:
            sums.index_add_(0, self._where[0], acts.abs().sum(1))


@contextmanager
def spliced(bridge: TransformerBridge, sites: Sequence[Site], condition: str, record: bool = False) -> Iterator[Splice]:
    """Edits every forward pass of `bridge.original_model` inside the `with`; `raw` edits nothing, whatever the sites.

    Raises ModelError where a transcoder does not fit the model, ValueError where the condition is unknown or lacks what
    it needs.
    """
    if condition == "raw":
        yield Splice((), CONDITIONS["no_delta"], record)
        return
    _check(bridge, sites, condition)
    splice = Splice(sites, CONDITIONS[condition], record)
    with bridge.hooks(fwd_hooks=splice.hooks()):
        yield splice


def _check(bridge: TransformerBridge, sites: Sequence[Site], condition: str) -> None:
    if condition not in CONDITIONS:
        raise ValueError(f"no condition {condition!r}; there are raw, {', '.join(CONDITIONS)}")
    layers = [site.layer for site in sites]
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"condition {condition} needs one site for each of one or more layers, got layers {layers}")
    for site in sites:
        if site.delta is None and CONDITIONS[condition].uses_delta:
            raise ValueError(f"condition {condition} needs a delta transcoder, and layer {site.layer} has none")
        check_fits(
            site.base,
            d_model=bridge.cfg.d_model,
            n_layers=bridge.cfg.n_layers,
            taps=site.base.taps,
            origin=f"layer {site.layer}: base",
        )
        for name in tap_names(site.base.taps, site.layer):
            if name not in bridge.hook_dict:
                raise ModelError(f"layer {site.layer}: this model has no {name}, which the transcoder needs")

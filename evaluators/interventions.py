"""Interventions: what replaces a layer's MLP output, and the hooks that do it.

In: a TransformerBridge, the sites (layer, base, delta) and a condition's name. Out: a context in which every forward
pass of the model is edited, prompt and generated tokens alike, BOS and padding never. A new condition is one entry of
`CONDITIONS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.bridge import tap_names
from models.transcoder import Transcoder

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Site:
    """One layer where transcoders are spliced in."""

    layer: int
    base: Transcoder
    delta: Transcoder | None = None


@dataclass(frozen=True)
class Condition:
    """How an MLP's output y is replaced, given base(x), delta(x) and the row's strength, all (tokens, ...)."""

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


@dataclass
class Splice:
    """The state of an edit while it is active.

    Before each forward pass the caller sets `editable` (batch, chunk), True where tokens are replaced, and `alpha`
    (batch,). With `record` on, `base_acts` and `delta_acts` (batch,) sum |activation| over the edited tokens of all
    sites since the last `reset`.
    """

    sites: Sequence[Site]
    condition: Condition
    editable: Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    alpha: Tensor = field(default_factory=lambda: torch.ones(0))
    record: bool = False
    base_acts: Tensor = field(default_factory=lambda: torch.zeros(0))
    delta_acts: Tensor = field(default_factory=lambda: torch.zeros(0))
    _inputs: dict[int, Tensor] = field(default_factory=dict)

    def reset(self, editable: Tensor, alpha: Tensor) -> None:
        """Prepares for a forward pass over a chunk whose tokens `editable` marks."""
        self.editable, self.alpha = editable, alpha
        self.base_acts = torch.zeros(len(editable), device=editable.device)
        self.delta_acts = torch.zeros(len(editable), device=editable.device)

    def hooks(self) -> list[tuple[str, Callable]]:
        pairs: list[tuple[str, Callable]] = []
        for site in self.sites:
            read, write = tap_names(site.base.taps, site.layer)
            pairs += [(read, self._reader(site)), (write, self._writer(site))]
        return pairs

    def _reader(self, site: Site) -> Callable:
        def read(x: Tensor, hook: object) -> None:
            self._inputs[site.layer] = x

        return read

    def _writer(self, site: Site) -> Callable:
        def write(y: Tensor, hook: object) -> Tensor:
            x = self._inputs.pop(site.layer)[self.editable]
            rows = self.editable.nonzero()[:, 0]
            base_acts = site.base.encode(x)
            base = site.base.decode(base_acts)
            delta = torch.zeros_like(base)
            if self.condition.uses_delta and site.delta is not None:
                delta_acts = site.delta.encode(x)
                delta = site.delta.decode(delta_acts)
                if self.record:
                    self.delta_acts.index_add_(0, rows, delta_acts.abs().sum(1))
            if self.record:
                self.base_acts.index_add_(0, rows, base_acts.abs().sum(1))
            true = y[self.editable]
            edited = y.clone()
            replaced = self.condition.combine(true.float(), base, delta, self.alpha[rows].unsqueeze(1))
            edited[self.editable] = replaced.to(y.dtype)
            return edited

        return write


@contextmanager
def spliced(bridge: TransformerBridge, sites: Sequence[Site], condition: str, record: bool = False) -> Iterator[Splice]:
    """Edits every forward pass of `bridge.original_model` inside the `with`; `raw` or no sites edits nothing."""
    if condition == "raw" or not sites:
        yield Splice((), CONDITIONS["no_delta"])
        return
    splice = Splice(sites, CONDITIONS[condition], record=record)
    with bridge.hooks(fwd_hooks=splice.hooks()):
        yield splice

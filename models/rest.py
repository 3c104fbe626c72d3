"""What finetuning changed outside every site, such as embeddings, the unembedding and norms that no site owns.

In: a TransformerBridge of the finetuned model, and the un-finetuned values of such parameters. Out: the bridge, run
with them at a strength. All of these parts are linear in their weights, so that weights in between give outputs in
between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from models.weights import open_weights

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Rest:
    """The un-finetuned values of the parameters, by transformers' names."""

    unfinetuned: Mapping[str, Tensor]

    @contextmanager
    def at(self, bridge: TransformerBridge, alpha: float) -> Iterator[None]:
        """The bridge runs with `W + alpha (W' - W)`, W un-finetuned and W' its own, while the `with` lasts."""
        own = _parameters(bridge)
        displaced = {id(own[name]): (own[name], own[name].data) for name in self.unfinetuned}  # tied ones are one
        for name, start in self.unfinetuned.items():
            finetuned = displaced[id(own[name])][1]
            own[name].data = _between(start.to(finetuned), finetuned, alpha)
        bridge.__dict__["displaced"] = list(displaced.values())
        try:
            yield
        finally:
            for parameter, data in bridge.__dict__.pop("displaced"):
                parameter.data = data


@contextmanager
def finetuned_rest(bridge: TransformerBridge) -> Iterator[None]:
    """Inside `Rest.at`, the bridge runs with the finetuned values while this `with` lasts."""
    displaced: list[tuple[nn.Parameter, Tensor]] = bridge.__dict__.get("displaced", [])
    there = [parameter.data for parameter, _ in displaced]
    for parameter, data in displaced:
        parameter.data = data
    try:
        yield
    finally:
        for (parameter, _), data in zip(displaced, there, strict=True):
            parameter.data = data


def read_rest(folder: Path, names: Sequence[str]) -> Rest:
    """The parameters of these names in the un-finetuned model's folder."""
    return Rest(open_weights(folder).read(names))


def _between(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    """At both ends to the last bit."""
    return start if alpha == 0.0 else end if alpha == 1.0 else torch.lerp(start, end, alpha)


def _parameters(bridge: TransformerBridge) -> dict[str, nn.Parameter]:
    """Those of the wrapped model, by their names before wrapping, those of tied weights too."""
    model: Any = bridge.original_model
    named = model.named_parameters(remove_duplicate=False)
    return {name.replace("_original_component.", ""): parameter for name, parameter in named}

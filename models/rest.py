"""What finetuning changed outside every site, such as embeddings, the unembedding and norms that no site owns.

In: a TransformerBridge of the finetuned model, and the un-finetuned values of such parameters. Out: the bridge, run
with them at a strength. All of these parts are linear in their weights, so interpolated weights give interpolated
outputs.
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
        """Inside the `with`, the bridge runs with `W + alpha (W' - W)`, W un-finetuned and W' its own."""
        live = _parameters(bridge)
        displaced = {id(live[name]): (live[name], live[name].data) for name in self.unfinetuned}  # tied weights once
        bridge.__dict__["displaced"] = list(displaced.values())
        try:  # from the first change on: memory may run out at the second
            for name, start in self.unfinetuned.items():
                finetuned = displaced[id(live[name])][1]
                live[name].data = _between(start.to(finetuned), finetuned, alpha)
            yield
        finally:
            for parameter, data in bridge.__dict__.pop("displaced"):
                parameter.data = data


@contextmanager
def finetuned_rest(bridge: TransformerBridge) -> Iterator[None]:
    """Restores the finetuned values inside this `with`, for use within `Rest.at`."""
    displaced: list[tuple[nn.Parameter, Tensor]] = bridge.__dict__.get("displaced", [])
    current = [parameter.data for parameter, _ in displaced]
    for parameter, data in displaced:
        parameter.data = data
    try:
        yield
    finally:
        for (parameter, _), data in zip(displaced, current, strict=True):
            parameter.data = data


def read_rest(folder: Path, names: Sequence[str]) -> Rest:
    """The parameters with these names, from the un-finetuned model's folder."""
    return Rest(open_weights(folder).read(names))


def _between(start: Tensor, end: Tensor, alpha: float) -> Tensor:
    """Interpolates; exact to the last bit at alpha 0 and 1."""
    return start if alpha == 0.0 else end if alpha == 1.0 else torch.lerp(start, end, alpha)


def _parameters(bridge: TransformerBridge) -> dict[str, nn.Parameter]:
    """The wrapped model's parameters by their names before wrapping, including all names of tied weights."""
    model: Any = bridge.original_model
    named = model.named_parameters(remove_duplicate=False)
    return {name.replace("_original_component.", ""): parameter for name, parameter in named}

"""Interventions: the hooks that replace a layer's MLP output.

In: a TransformerBridge and an `Edit`: sites (layer, base, delta) and a condition's name. Out: a context in which every
forward pass of the model is edited, prompt and generated tokens alike, BOS and padding never.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from evaluators.conditions import CONDITIONS, Condition
from evaluators.splice.passes import Prefix
from evaluators.splice.sites import Site
from models.bridge import read_input, tap_names
from models.errors import ModelError
from models.transcoder import check_fits

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Edit:
    """What is spliced in: the sites, and the condition that says how they replace their MLPs; `raw` edits nothing,
    whatever the sites."""

    sites: Sequence[Site] = ()
    condition: str = "raw"


class Outputs(NamedTuple):
    """What a site's transcoders make of some tokens: outputs (tokens, d_model), sums of |activation| (tokens,), and the
    delta's activations (tokens, d_new)."""

    base: Tensor
    delta: Tensor
    base_acts: Tensor
    delta_acts: Tensor
    features: Tensor

    def take(self, tokens: Tensor) -> Outputs:
        return Outputs(*(column[tokens] for column in self))


class Splice:
    """The state of an edit while it is active.

    Before each forward pass the caller says with `reset` which tokens are replaced and how strong each row's delta is.
    With `record`, `base_acts` and `delta_acts` (batch,) are then the sums of |activation| over those tokens and all
    sites.
    """

    def __init__(self, sites: Sequence[Site], condition: Condition, record: bool) -> None:
        self.sites, self.condition, self.record = sorted(sites, key=lambda site: site.layer), condition, record
        self._inputs: dict[int, Tensor] = {}

    def reset(
        self, editable: Tensor, alpha: Tensor, numbers: Tensor | None = None, ablated: Tensor | None = None
    ) -> None:
        """Prepares for a forward pass over a chunk: `editable` (batch, chunk) is True where a token is replaced,
        `alpha` (batch,) is the strength of each row, `numbers` (batch, chunk) are the tokens' numbers in the text (0
        where not given), for sites with a pool, and `ablated` (batch,) is the delta feature that each row lacks, or
        -1."""
        self._where = editable.nonzero(as_tuple=True)
        self._numbers = torch.zeros_like(self._where[0]) if numbers is None else numbers[self._where]
        self._alpha = alpha[self._where[0]].unsqueeze(1)
        self._ablated = None if ablated is None or (ablated < 0).all() else ablated[self._where[0]]
        self.base_acts = torch.zeros(len(editable), device=editable.device)
        self.delta_acts = torch.zeros(len(editable), device=editable.device)

    def start(self, prefixes: Sequence[Prefix], rows: Sequence[int], length: int) -> Tensor:
        """The residual streams (batch, length, d_model), left-padded, that leave the first site's layer.

        Row i of the batch that `reset` was told is the text of `prefixes[rows[i]]`: its transcoders are evaluated once
        a text, whatever the number of strengths.
        """
        site, device = self.sites[0], self._alpha.device
        texts = [len(prefix.x) - 1 for prefix in prefixes]  # all but BOS
        x, y = (torch.cat([prefix[column][1:] for prefix in prefixes]) for column in (0, 1))
        numbers = torch.arange(len(x)).split(texts)
        tokens = torch.cat([numbers[row] for row in rows]).to(device)
        outputs = self._of_row(site, self._outputs(site, read_input(site.base.taps, x)).take(tokens))
        streams = [prefix.output for prefix in prefixes]
        residual = streams[0].new_zeros(len(rows), length, streams[0].shape[1])
        for place, row in enumerate(rows):
            residual[place, length - len(streams[row]) :] = streams[row]
        y = y[tokens]
        # The block adds the MLP's output to the stream, so that the edit is the difference of two outputs.
        change = self._replaced(y, outputs) - y.float()
        residual[self._where] = (residual[self._where].float() + change).to(residual.dtype)
        return residual

    def hooks(self, sites: Sequence[Site]) -> list[tuple[str, Callable]]:
        """(hook name, function) pairs that make the edit at `sites`."""
        pairs: list[tuple[str, Callable]] = []
        for site in sites:
            read, write = tap_names(site.base.taps, site.layer)
            pairs += [(read, self._reader(site)), (write, self._writer(site))]
        return pairs

    def _reader(self, site: Site) -> Callable:
        def read(x: Tensor, hook: object) -> None:
            self._inputs[site.layer] = read_input(site.base.taps, x)

        return read

    def _writer(self, site: Site) -> Callable:
        def write(y: Tensor, hook: object) -> Tensor:
            outputs = self._of_row(site, self._outputs(site, self._inputs.pop(site.layer)[self._where]))
            edited = y.clone()
            edited[self._where] = self._replaced(y[self._where], outputs).to(y.dtype)
            return edited

        return write

    def _outputs(self, site: Site, x: Tensor) -> Outputs:
        base_acts = site.base.encode(x)
        base = site.base.decode(base_acts)
        if site.delta is None or not self.condition.uses_delta:
            nothing = torch.zeros_like(base)
            return Outputs(base, nothing, base_acts.abs().sum(1), nothing[:, 0], nothing[:, :0])
        delta_acts = site.delta.encode(x)
        delta = site.delta.decode(delta_acts)
        return Outputs(base, delta, base_acts.abs().sum(1), delta_acts.abs().sum(1), delta_acts)

    def _of_row(self, site: Site, outputs: Outputs) -> Outputs:
        """The same with what differs between rows: the delta's output from the site's pool, or without a feature."""
        if not self.condition.uses_delta:
            return outputs
        if site.pool is not None:
            return outputs._replace(delta=site.pool[self._numbers % len(site.pool)])
        if self._ablated is None or site.delta is None:
            return outputs
        feature = self._ablated.clamp(min=0)
        strength = outputs.features.gather(1, feature.unsqueeze(1)) * (self._ablated >= 0).unsqueeze(1)
        silent = outputs.delta - strength * site.delta.W_dec[feature]
        return outputs._replace(delta=silent, delta_acts=outputs.delta_acts - strength.abs()[:, 0])

    def _replaced(self, y: Tensor, outputs: Outputs) -> Tensor:
        """(tokens, d_model) fp32 in place of `y`, for the tokens told to `reset`."""
        if self.record:
            self.base_acts.index_add_(0, self._where[0], outputs.base_acts)
            self.delta_acts.index_add_(0, self._where[0], outputs.delta_acts)
        return self.condition.combine(y.float(), outputs.base, outputs.delta, self._alpha)


@contextmanager
def spliced(
    bridge: TransformerBridge, edit: Edit, *, record: bool = False, above_first: bool = False
) -> Iterator[Splice]:
    """Makes the edit in every forward pass of `bridge.original_model` inside the `with`.

    With `above_first` the edit of the lowest site is left to `Splice.start`, for passes that begin above its layer.

    Raises ModelError where a transcoder does not fit the model, ValueError where the condition is unknown or lacks what
    it needs.
    """
    if edit.condition == "raw":
        yield Splice((), CONDITIONS["no_delta"], record)
        return
    _check(bridge, edit)
    splice = Splice(edit.sites, CONDITIONS[edit.condition], record)
    with bridge.hooks(fwd_hooks=splice.hooks(splice.sites[above_first:])):
        yield splice


def _check(bridge: TransformerBridge, edit: Edit) -> None:
    condition = edit.condition
    if condition not in CONDITIONS:
        raise ValueError(f"no condition {condition!r}; there are raw, {', '.join(CONDITIONS)}")
    layers = [site.layer for site in edit.sites]
    if not layers or len(set(layers)) != len(layers):
        raise ValueError(f"condition {condition} needs one site for each of one or more layers, got layers {layers}")
    for site in edit.sites:
        if site.delta is None and CONDITIONS[condition].uses_delta:
            raise ValueError(f"condition {condition} needs a delta transcoder, and layer {site.layer} has none")
        if condition == "shuffled_delta" and site.pool is None:
            raise ValueError(f"condition {condition} needs a pool of outputs, and layer {site.layer} has none")
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
